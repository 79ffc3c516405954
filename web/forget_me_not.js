// What the page does for its own nodes alone, or in newer versions alone: a node's `ui.text` on the node, where it stays
// (a progress text goes when the job ends), and the `display_name` of an input.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODES = new Set([
    "FMN_CompareTokenAttention",
    "FMN_EvaluatePatch",
    "FMN_ExportPatch",
    "FMN_ForgetConcept",
    "FMN_GatePatch",
    "FMN_ImportPatch",
    "FMN_InspectPatch",
    "FMN_InvertConcept",
    "FMN_SavePatch",
    "FMN_SaveTokenAttention",
    "FMN_StackPatches",
    "FMN_VisualizeTokenAttention",
]);
const WIDGET = "result";
const MIN_HEIGHT = 70;

// The session keeps texts over a reload of the page or the workflow. Neither the workflow nor the prompt holds them: both
// go into every picture, and a text names files of this machine.
const key = (node) => `forget-me-not/${node.graph?.id}/${node.id}`;

function addWidget(node) {
    const placeholder = "What came of it, once it has run";
    const { widget } = app.widgets.STRING(node, WIDGET, ["STRING", { multiline: true, placeholder }], app);
    widget.serialize = false; // in the workflow
    Object.assign(widget.options, { serialize: false, read_only: true, getMinHeight: () => MIN_HEIGHT }); // and in the prompt
    widget.element.readOnly = true;
}

function show(node, text) {
    const widget = node?.widgets?.find((widget) => widget.name === WIDGET);
    if (!widget) return;
    widget.value = text;
    widget.callback?.(text); // Nodes 2.0 of older pages draws what it is told of
    session((storage) => storage.setItem(key(node), text));
}

function restore(node) {
    const text = session((storage) => storage.getItem(key(node)));
    if (text) show(node, text);
}

// Where the session is full or forbidden, a text stays as long as the page.
function session(use) {
    try {
        return use(window.sessionStorage);
    } catch {
        return null;
    }
}

function chain(node, name, then) {
    const before = node[name];
    node[name] = function (...values) {
        before?.apply(this, values);
        then(this, ...values);
    };
}

// The node that runs as "12", or as "5:12" inside the subgraph node 5.
function findNode(id) {
    const path = String(id).split(":");
    const last = path.pop();
    const root = app.rootGraph ?? app.graph;
    const graph = path.reduce((graph, id) => graph?.getNodeById(Number(id))?.subgraph, root);
    return graph?.getNodeById(Number(last));
}

function nameWidgets(node) {
    const inputs = node.constructor.nodeData?.inputs ?? {};
    for (const widget of node.widgets ?? []) {
        const name = inputs[widget.name]?.display_name;
        if (name) widget.label = name;
    }
}

app.registerExtension({
    name: "ForgetMeNot",
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("FMN_")) return;
        nameWidgets(node);
        if (!NODES.has(node.comfyClass)) return;
        addWidget(node);
        chain(node, "onConfigure", restore);
        chain(node, "onExecuted", (node, output) => output?.text && show(node, output.text.join("\n")));
    },
    setup() {
        // What a node says that ends without an output, since it was stopped.
        api.addEventListener("forget-me-not.text", ({ detail }) => show(findNode(detail.node), detail.text));
    },
});
