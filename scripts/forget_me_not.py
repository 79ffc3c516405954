"""The door of the webuis: while this file loads, the extension's folder is on sys.path, so all is imported here."""

from modules import script_callbacks

from fmn_webui.api import add_routes
from fmn_webui.applying import add_page_setting
from fmn_webui.script import ForgetMeNotScript
from fmn_webui.tab import make_tab

__all__ = ["ForgetMeNotScript"]  # the host registers the scripts that it finds here

script_callbacks.on_ui_settings(add_page_setting)
script_callbacks.on_ui_tabs(make_tab)
script_callbacks.on_app_started(add_routes)
