from standin import strict

models_path = ""  # host_page sets it
strict(__name__)
