"""Other people's files: folders of HF PEFT and adapters, served formats, the hub."""
