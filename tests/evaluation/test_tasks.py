"""lm-eval's requests on packed caches: the figures against log-likelihoods and generations made by hand."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvcalib[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from kvcalib.errors import CacheBypassed, InputError
from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.contender import ArtifactContender, Unquantized
from kvcalib.evaluation.tasks import PackedLM, metrics
from kvcalib.model.loading import BUILTIN, load_model, load_tokenizer
from kvcalib.runtime.loader import attach, detach
from tests.tiny import make_artifact

CHOICES = [
    ("Return the", " value"),
    ("Return the", " name of the file and the path of the folder"),
    ("The type of the object is", " a list of strings"),
    ("If the file does not exist an error is raised, and the", " path"),
    ("x", " y"),
]
PROMPTS = ["Return the", "The type of the object is", "If the file does not exist an error", "Return the name"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo model, its tokenizer and a coarse artifact that keeps a recent window."""
    model = load_model(BUILTIN)
    artifact = make_artifact(tmp_path_factory.mktemp("lm"), model, recent=3, key_bits=2, value_bits=2, choices=None)
    return model, load_tokenizer(BUILTIN), artifact


def scores(lm, pairs=CHOICES):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


def answers(lm, tokens=6):
    given = {"until": ["\n\n\n"], "max_gen_toks": tokens, "do_sample": False}
    return lm.generate_until([Instance("generate_until", {}, (p, given), i) for i, p in enumerate(PROMPTS)])


def by_hand(model, tokenizer, cache, pair):
    """Log-likelihood of a continuation from one pass of the model, token by token."""
    context, continuation = pair
    ids = tokenizer(context + continuation)["input_ids"]
    first = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]]), past_key_values=cache).logits[0]
    return sum(logits[i - 1].log_softmax(-1)[ids[i]].item() for i in range(first, len(ids)))


@pytest.mark.parametrize("batch", [1, 4])
def test_log_likelihoods_are_those_of_the_packed_cache(made, batch):
    model, tokenizer, artifact = made
    with PackedLM(model, tokenizer, contender=ArtifactContender(artifact), batch_size=batch) as lm:
        found = [score for score, _ in scores(lm)]
        assert lm.attached_calls >= 1
        assert lm.cached_tokens > 0
    attachment = attach(model, artifact)
    expected = [by_hand(model, tokenizer, attachment.make_cache(), pair) for pair in CHOICES]
    detach(model)
    plain = [by_hand(model, tokenizer, None, pair) for pair in CHOICES]
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(expected, plain, strict=True)) > 0.02, "the artifact is too fine to tell"
    with PackedLM(model, tokenizer, batch_size=batch) as lm:
        assert [score for score, _ in scores(lm)] == pytest.approx(plain, abs=1e-4)
        assert lm.contender.name == "fp16"


@pytest.mark.parametrize("spec", ["artifact", "kivi:bits=2:group=4:residual=4", "int:bits=2"])
def test_a_batch_gives_what_its_rows_give_alone(made, spec):
    """Padding at the end of a row would enter its last group's scale, or its recent window."""
    model, tokenizer, artifact = made
    contender = ArtifactContender(artifact) if spec == "artifact" else find(spec)
    pairs = [*CHOICES, ("Return the", " path"), ("Return the", " name of the folder and the path of the file")]
    alone, together = [], []
    for size, into in ((1, alone), (4, together)):
        with PackedLM(model, tokenizer, contender=contender, batch_size=size) as lm:
            into += [score for score, _ in scores(lm, pairs)]
            into += answers(lm)
    assert alone[len(pairs) :] == together[len(pairs) :]
    assert alone[: len(pairs)] == pytest.approx(together[: len(pairs)], abs=1e-3)


def test_generations_are_those_of_the_packed_cache(made):
    model, tokenizer, artifact = made
    with PackedLM(model, tokenizer, contender=ArtifactContender(artifact), batch_size=4) as lm:
        found = answers(lm, 8)
        assert lm.attached_calls > 8
        assert lm.cached_tokens >= sum(len(tokenizer(p)["input_ids"]) + 7 for p in PROMPTS)
        assert lm.cache_bytes > 0
    attach(model, artifact)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(out, skip_special_tokens=True))
    detach(model)
    assert found == expected
    with PackedLM(model, tokenizer, batch_size=4) as lm:
        assert answers(lm, 8) != expected


def test_an_exact_prefill_does_not_hide_the_error_of_log_likelihoods(made):
    model, tokenizer, artifact = made
    found = []
    for prefill in ("quantized", "exact"):
        with PackedLM(model, tokenizer, contender=ArtifactContender(artifact, recent=0, prefill=prefill)) as lm:
            found.append((scores(lm), answers(lm)))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_rolling_log_likelihoods(made):
    model, tokenizer, artifact = made
    text = "Return the name of the file and the path of the folder."
    with PackedLM(model, tokenizer, contender=ArtifactContender(artifact)) as lm:
        (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
        prefix = lm.prefix_token_id
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = (attach(model, artifact), model(input_ids=torch.tensor([[prefix, *ids[:-1]]])))[1].logits[0]
    detach(model)
    assert found == pytest.approx(sum(logits[i].log_softmax(-1)[t].item() for i, t in enumerate(ids)), abs=1e-4)


class Careless(PackedLM):
    """Calls the model as HFLM does."""

    def _model_call(self, inps, attn_mask=None, labels=None):
        return self.model(inps).logits

    def _model_generate(self, context, max_length, stop, **generation):
        return HFLM._model_generate(self, context, max_length, stop, **generation)


class Forgetful(PackedLM):
    """Makes a cache and then runs the model without its own doors."""

    def _model_call(self, inps, attn_mask=None, labels=None):
        with self._cache(*inps.shape):
            return torch.zeros(*inps.shape, 2048)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ask", [scores, answers])
def test_a_pass_without_the_cache_is_an_error(made, packed, ask):
    model, tokenizer, artifact = made
    contender = ArtifactContender(artifact) if packed else Unquantized()
    with (
        Careless(model, tokenizer, contender=contender) as lm,
        pytest.raises(CacheBypassed, match=f"in place of the cache of '{contender.name}'"),
    ):
        ask(lm)
    with Forgetful(model, tokenizer, contender=contender) as lm, pytest.raises(CacheBypassed, match="0 tokens in 0"):
        scores(lm)


def test_the_model_is_given_back(made):
    model, tokenizer, artifact = made
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    lm = PackedLM(model, tokenizer, contender=ArtifactContender(artifact))
    with pytest.raises(RuntimeError, match="attached already"):
        attach(model, artifact)
    lm.close()
    assert torch.equal(model(ids).logits, before)


def test_by_name_from_the_harness_registry(made):
    _, _, artifact = made
    kind = get_model("kvcalib")
    assert kind is PackedLM
    with kind.create_from_arg_obj(
        {"pretrained": BUILTIN, "artifact": str(artifact.path)}, {"batch_size": 2, "device": None}
    ) as lm:
        assert lm.contender.artifact.path == artifact.path
        scores(lm)
        assert lm.attached_calls
    with pytest.raises(InputError, match="batch_size is 'auto'"):
        PackedLM(BUILTIN, batch_size="auto")
    with pytest.raises(InputError, match="artifact and contender are both given"):
        PackedLM(BUILTIN, artifact="a", contender=Unquantized())


def test_metrics_by_task_and_filter():
    results = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A"}, "b": {"em,strict": 1, "samples": 3}}
    assert metrics({"results": results}) == {"a/acc": 0.5, "b/em,strict": 1.0}
