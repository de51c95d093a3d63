"""A real trained model, stories260K of llama2.c, tells its published story: token for token."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import MATERIAL

import llama
import mistral

STORIES = MATERIAL / "tinyllamas"
pytestmark = pytest.mark.skipif(not STORIES.exists(), reason="stories260K is not at hand")


@pytest.fixture(scope="module")
def published():
    return json.loads((STORIES / "stories260K-greedy-reference.json").read_text())


@pytest.fixture(scope="module", params=["llama", "mistral"])
def module_and_model(request, tmp_path_factory):
    """The same file also is a Mistral whose window is longer than the text."""
    if request.param == "llama":
        return llama, llama.load(STORIES / "stories260K-hf")
    folder = tmp_path_factory.mktemp("mistral")
    config = json.loads((STORIES / "stories260K-hf" / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(STORIES / "stories260K-hf" / "model.safetensors")
    return mistral, mistral.load(folder)


def test_greedy_tokens_are_the_published_ones(module_and_model, published):
    module, model = module_and_model
    ids = published["token_ids"]
    [new] = module.generate(model, [ids[:1]], len(ids) - 1, key=jax.random.key(0), temperature=0)
    assert new == ids[1:]


def test_logits_and_loss_are_the_published_ones(module_and_model, published):
    _, model = module_and_model
    ids = jnp.array([published["token_ids"]])
    logits = model(ids)
    np.testing.assert_allclose(
        logits[0, 0, :16], published["logits_after_bos_first16"], rtol=0, atol=1e-4
    )  # given to four digits or so
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    assert -float(chosen.mean()) == pytest.approx(published["mean_nll_of_ids"], abs=1e-4)
