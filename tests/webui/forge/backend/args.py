from standin import strict

dynamic_args = {"embedding_dir": "", "emphasis_name": "original", "online_lora": False}


strict(__name__)
