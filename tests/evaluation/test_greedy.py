"""Greedy generations against `generate`, and their divergence against a count by hand."""

import pytest
from transformers import GenerationConfig

import kvcalib
from kvcalib.errors import InputError
from kvcalib.evaluation.contender import ArtifactContender, Unquantized
from kvcalib.evaluation.failures import Failures
from kvcalib.evaluation.greedy import divergence, generate, measure_greedy, room
from kvcalib.evaluation.trials import Session
from tests.evaluation.contenders import Custom, Refusing, no_values
from tests.tiny import make_artifact, tiny_llama, tokens

NEW = 20


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    return model


def by_transformers(model, prompt):
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return model.generate(prompt, generation_config=config)[0, prompt.shape[1] :].tolist()


def test_generations_are_those_of_transformers(model):
    for prompt in tokens(3, 15).split(1):
        assert generate(Session(model, None), prompt, NEW) == by_transformers(model, prompt)


def test_equal_caches_write_the_same(model):
    found = measure_greedy(model, [Unquantized(), Custom("own")], tokens(3, 15).numpy(), NEW, Failures())
    assert found["fp16"] == found["own"]
    assert found["own"].model_dump() == {
        "prompts": 3, "tokens": NEW, "first_difference": NEW, "identical": 1, "agreement": 1
    }  # fmt: skip


def test_an_artifacts_generations_are_those_of_the_attached_model(model, tmp_path):
    artifact = make_artifact(tmp_path, model, key_bits=2, value_bits=2)
    prompts = tokens(4, 15)
    found = measure_greedy(model, [ArtifactContender(artifact, "two")], prompts.numpy(), NEW, Failures())["two"]
    exact = [by_transformers(model, prompt) for prompt in prompts.split(1)]
    kvcalib.attach(model, artifact)
    packed = [by_transformers(model, prompt) for prompt in prompts.split(1)]
    kvcalib.detach(model)
    assert found == divergence(exact, packed)
    assert found.identical < 1


def test_divergence_is_counted_by_hand():
    expected = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]
    found = [[1, 2, 0, 4], [5, 6, 7, 8], [0, 9, 9, 0]]
    measured = divergence(expected, found)
    assert measured.first_difference == 2  # of 2, 4 and 0
    assert measured.identical == pytest.approx(1 / 3)
    assert measured.agreement == pytest.approx(9 / 12)
    with pytest.raises(ValueError, match="all of one length"):
        divergence([[1, 2]], [[1]])
    with pytest.raises(ValueError, match="as many generations"):
        divergence([[1, 2]], [[1, 2], [3, 4]])


def test_faults_diverge_early_and_failures_are_left_out(model):
    failures = Failures()
    contenders = [Custom("faulty", no_values, 1), Refusing()]
    found = measure_greedy(model, contenders, tokens(3, 15).numpy(), NEW, failures)
    assert found["faulty"].first_difference < NEW / 2
    assert list(found) == ["faulty"]
    assert failures == {"refusing": "this model's layers are not for it"}


def test_generations_end_with_the_context(model):
    assert room(model, 100) == 412
    assert room(model, 100, 64) == 64
    with pytest.raises(InputError, match="a prompt of 512 tokens leaves no room in the model's context of 512"):
        room(model, 512)


def test_prompts_are_told(model):
    told = []
    measure_greedy(model, [], tokens(2, 9).numpy(), 2, Failures(), told.append)
    assert told == [1, 2]
