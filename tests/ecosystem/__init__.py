"""Other libraries on the envs, a file each: ``run.py`` installs and runs them all, plain pytest those that it finds."""

ID = "SD/Classification-Mini-v0"
SMALL = {"train_size": 60, "validation_size": 20, "test_size": 20}
