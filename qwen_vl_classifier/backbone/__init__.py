"""Examples in, pooled hidden states out: loading, prompts, packing and the pass through the model."""

from qwen_vl_classifier.extras import require_versions

require_versions()  # an old transformers would fail in places that say nothing of its age
