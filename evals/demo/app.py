"""The demo as a Hugging Face Space: its app file is these two lines,

    from vtprune.evals.demo.app import main
    main()

beside a requirements.txt with `vtprune[demo]`. VTPRUNE_MODELS names models, separated by commas.
"""

from __future__ import annotations

import os

from vtprune.evals.demo.server import Options, serve


def main() -> None:
    """Serves on the port that a Space expects."""
    models = tuple(name.strip() for name in os.environ.get("VTPRUNE_MODELS", "").split(",") if name.strip())
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    serve(Options(models=models, host="0.0.0.0", port=port))


if __name__ == "__main__":
    main()
