"""Run the command line with `python -m qwen_vl_classifier`."""

from qwen_vl_classifier.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
