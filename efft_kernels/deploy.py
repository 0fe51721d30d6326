"""The former name of efft_kernels.serving.app, kept for `import_path: efft_kernels.deploy:app` and its command."""

from .serving.app import Settings, app  # noqa: F401
from .serving.cli import main

if __name__ == "__main__":
    main()
