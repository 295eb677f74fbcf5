"""ShortV's layer contribution, against a transcription of the authors' computation."""

from __future__ import annotations

import numpy as np

from tests.analysis import references
from tests.analysis.conftest import ARCH, Case
from visor_jax.analysis.contribution import measure


def kl_div(inputs: np.ndarray, targets: np.ndarray) -> float:
    """`torch.nn.KLDivLoss(reduction="batchmean")(inputs, targets)` of one row: inputs are logarithms, targets not."""
    return float(np.sum(targets * (np.log(targets) - inputs)))


def test_contribution_is_that_of_the_authors_code(case: Case) -> None:
    """They compare the last logits of the prompt: KLDivLoss(log_softmax(unchanged), softmax(replaced))."""
    found = measure(case.probe)
    for row in range(2):
        unchanged = references.run(case, row).log_probs
        for layer in range(ARCH.text.num_layers):
            replaced = np.exp(references.run(case, row, frozen=(layer,)).log_probs)
            of_tokens = [kl_div(one, other) for one, other in zip(unchanged, replaced, strict=True)]
            np.testing.assert_allclose(found["contribution"][layer, row], of_tokens[0], rtol=1e-3, atol=2e-6)
            np.testing.assert_allclose(
                found["answer_contribution"][layer, row], np.mean(of_tokens), rtol=1e-3, atol=2e-6
            )
    np.testing.assert_allclose(found["contribution"][-1], 0, atol=1e-6)  # nothing reads V after the last layer
    assert np.all(found["contribution"][:-1, :2] > 1e-5)
