import os

os.environ.setdefault("RUST_LOG", "warn")  # torchft writes ten lines for each update otherwise, and reads this once
