// Asks for the jobs' state while the tab is in view: often while one is at work, seldom else. No request is held open, so
// a job of hours loses no page, and a page that comes back finds its job.
(function () {
    const BUSY = 1000, IDLE = 5000;
    let asked = 0;

    function ask() {
        const status = gradioApp().querySelector("#fmn_status");
        const button = gradioApp().querySelector("#fmn_refresh");
        if (!status || !button || document.hidden || status.offsetParent === null) return;
        const wait = status.querySelector(".fmn-busy") ? BUSY : IDLE;
        if (Date.now() - asked < wait) return;
        asked = Date.now();
        button.click();
    }

    onUiLoaded(() => setInterval(ask, 250));
})();
