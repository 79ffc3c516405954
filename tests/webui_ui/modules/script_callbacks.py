"""Callbacks as v1.8 and SD.Next take them: without a name."""

ui_tabs, app_started = [], []


def on_ui_tabs(callback):
    ui_tabs.append(callback)


def on_app_started(callback):
    app_started.append(callback)
