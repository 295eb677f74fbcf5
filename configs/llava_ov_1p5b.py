r"""LLaVA-OneVision 1.5B made adaptive: `llava_ov_0p5b.py` with Qwen2-1.5B as decoder, nine self-attention slots.

Reproduces: no table of the paper, which stops at 0.5B; the same stages on a larger decoder, where the share of the
vision tower in the cost is smaller. Not run by us: it needs accelerators.

    visor import --from=HF_DIR --workdir=DIR --config=configs/llava_ov_1p5b.py:HF_DIR/tokenizer.json
    visor run --config=configs/llava_ov_1p5b.py:HF_DIR/tokenizer.json --workdir=DIR \
        --config.data.root=DATA --config.data.path=train.json

`visor plan --config=configs/llava_ov_1p5b.py ...` says beforehand what a picture costs under each budget.
"""

from pathlib import Path

from ml_collections import ConfigDict

from visor_jax.config import config_from_file


def get_config(tokenizer: str = "tokenizer.json") -> ConfigDict:
    """The 0.5B recipe with another decoder.

    Args:
      tokenizer: path of the checkpoint's tokenizer.json.
    """
    config = config_from_file(Path(__file__).with_name("llava_ov_0p5b.py"), tokenizer)
    config.name = "llava_ov_1p5b"
    config.model.text.update(
        vocab_size=152_000,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return config
