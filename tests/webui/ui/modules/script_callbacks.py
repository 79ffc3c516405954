"""Callbacks as v1.8 and SD.Next take them: without a name."""

ui_tabs, ui_settings, app_started = [], [], []


def on_ui_tabs(callback):
    ui_tabs.append(callback)


def on_ui_settings(callback):
    ui_settings.append(callback)


def on_app_started(callback):
    app_started.append(callback)
