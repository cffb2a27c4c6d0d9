"""Each finding planted in records with made-up image facts, and none where nothing is wrong."""

from __future__ import annotations

import random

import pytest

from model.image_hash import HASH_BYTES
from model.preference_checks import LONG_PROMPT_CHARS, find
from model.preference_graph import contradictions, cycles
from model.preference_set import DataSet, ImageFacts, ImageFault
from model.preference_summary import summarize
from model.preferences import LabelledImage, PreferenceData, PreferencePair, image_uris


def pair(name, chosen, rejected, prompt=None, **more):
    prompt = f"prompt {name}" if prompt is None else prompt
    return PreferencePair(str(name), prompt, more.pop("rejected_prompt", prompt), chosen, rejected, **more)


def image(name, uri, label, prompt="", **group):
    return LabelledImage(str(name), prompt, uri, label, group)


def facts(content):
    """Of an image whose bytes are ``content``: a hash of its own, far from every other."""
    near_hash = random.Random(content).randbytes(HASH_BYTES)
    return ImageFacts(sha256=f"sha-{content}", size_bytes=100, width=64, height=32, near_hash=near_hash)


def dataset(*records, name="data", **special):
    """``special``: facts of images, by name; every other image has content of its own."""
    kind = "paired" if isinstance(records[0], PreferencePair) else "unpaired"
    uris = dict.fromkeys(uri for record in records for uri in image_uris(record))
    data = PreferenceData(kind, records, f"{name}.json", "f" * 64)
    return DataSet(name, data, {uri: special.get(uri, facts(uri)) for uri in uris})


def found(*sets, **options):
    """Name -> (level, where, count, first example)."""
    findings = find(*sets, **options)
    assert len({(one.name, one.where) for one in findings}) == len(findings)
    return {one.name: (one.level, one.where, one.count, *one.examples[:1]) for one in findings}


CLEAN = dataset(pair(1, "a", "b"), pair(2, "c", "d"), pair(3, "a", "e", "prompt 1"), name="train")


def test_nothing_is_found_in_clean_data():
    assert find(CLEAN) == []
    labelled = dataset(image(1, "a", 1, "x"), image(2, "b", 0, "y"))
    assert find(labelled) == []
    assert find(CLEAN, dataset(pair(1, "t", "u", "prompt t"), name="test")) == []


def test_unreadable_images_by_code():
    cut = ImageFault("image_truncated", "JPEG of 9 bytes ends before its last pixel")
    gone = ImageFault("image_not_found", "image_uri 'd': no such file")
    one = dataset(pair(1, "a", "b"), pair(2, "c", "d"), pair(3, "a", "d"), a=cut, b=cut, d=gone)
    findings = {finding.text: finding for finding in find(one)}
    assert findings["images that cannot be read (image_truncated)"].examples == (
        "a: JPEG of 9 bytes ends before its last pixel",
        "b: JPEG of 9 bytes ends before its last pixel",
    )
    assert findings["images that cannot be read (image_not_found)"].examples == ("image_uri 'd': no such file",)
    assert len(findings) == 2


def test_the_same_bytes_under_two_names():
    one = dataset(pair(1, "a", "b"), pair(2, "c", "d"), a=facts("same"), d=facts("same"))
    assert found(one) == {"same_image": ("note", "data", 1, "a = d")}


def test_repeated_records_are_found_by_content():
    one = dataset(pair(1, "a", "b", "x"), pair(2, "c", "b", "x"), pair(2, "d", "e"), a=facts("s"), c=facts("s"))
    assert found(one) == {
        "repeated_record": ("problem", "data", 1, "1, 2: 'x'"),
        "repeated_id": ("problem", "data", 1, "2"),
        "same_image": ("note", "data", 1, "a = c"),
    }
    labelled = dataset(image(1, "a", 1, "x"), image(2, "a", 1, "x"), image(3, "a", 1, "z"), image(4, "b", 0, "z"))
    assert found(labelled) == {"repeated_record": ("problem", "data", 1, "1, 2: 'x'")}


def test_contradictory_pairs():
    one = dataset(pair(1, "a", "b", "x"), pair(2, "b", "c", "x"), pair(3, "c", "a", "y"))
    assert found(one) == {}  # another prompt, another order
    one = dataset(pair(1, "a", "b", "x"), pair(2, "b", "a", "x"), pair(3, "c", "d", "x"))
    assert found(one) == {"contradictory_pairs": ("problem", "data", 1, "1 against 2: 'x'")}


def test_contradictory_hard_negatives():
    one = dataset(
        pair(1, "a", "a", "a cat", rejected_prompt="a dog"), pair(2, "a", "a", "a dog", rejected_prompt="a cat")
    )
    assert found(one) == {"contradictory_pairs": ("problem", "data", 1, "1 against 2: 'a cat'")}
    assert found(dataset(pair(1, "a", "a", "a cat", rejected_prompt="a dog"))) == {}


def test_identical_sides():
    one = dataset(pair(1, "a", "b", "x"), pair(2, "c", "c", "x"), a=facts("s"), b=facts("s"))
    assert found(one)["identical_sides"] == ("problem", "data", 2, "1: 'x'")
    assert set(found(one)) == {"identical_sides", "same_image"}


def test_cycles_of_one_prompt():
    ring = [pair(1, "a", "b", "x"), pair(2, "b", "c", "x"), pair(3, "c", "a", "x")]
    level, _, count, example = found(dataset(*ring, pair(4, "p", "q", "y")))["cycle"]
    assert (level, count) == ("problem", 1)
    assert example in ("a > b > c > a: 'x'", "b > c > a > b: 'x'", "c > a > b > c: 'x'")


def test_rates_against_the_order():
    one = dataset(
        pair(1, "a", "b", chosen_rate=1.0, rejected_rate=4.5),
        pair(2, "c", "d", chosen_rate=3.0, rejected_rate=3.0),
        pair(3, "e", "f", chosen_rate=3.0),
    )
    assert found(one) == {"rates_against_order": ("note", "data", 1, "1: chosen 1, rejected 4.5")}


def test_one_image_with_both_labels():
    one = dataset(image(1, "a", 1, "x"), image(2, "b", 0, "y"), image(3, "c", 1, "z"), a=facts("s"), b=facts("s"))
    assert found(one)["both_labels"] == ("problem", "data", 1, "b (2: 0, 1: 1)")


@pytest.mark.parametrize(("ones", "zeros", "level"), [(9, 1, None), (10, 1, "note"), (3, 0, "problem")])
def test_class_balance(ones, zeros, level):
    labels = [1] * ones + [0] * zeros
    one = dataset(*(image(index, f"i{index}", label, "x") for index, label in enumerate(labels)))
    # 1 of 10 is 10 %, which is not below the limit; 1 of 11 is 9.1 %.
    assert found(one) == ({} if level is None else {"class_balance": (level, "data", zeros)})


def test_prompts():
    one = dataset(
        pair(1, "a", "b", " \n"),
        pair(2, "c", "d", "x" * (LONG_PROMPT_CHARS + 1)),
        pair(3, "e", "f", rejected_prompt=""),
    )
    assert found(one) == {
        "empty_prompt": ("note", "data", 2, "1"),
        "long_prompt": ("note", "data", 1, f"2: {LONG_PROMPT_CHARS + 1} characters"),
    }


def near(content, bits):
    """Facts like those of ``content``, with other bytes, ``bits`` bits away."""
    original = int.from_bytes(facts(content).near_hash)
    near_hash = (original ^ ((1 << bits) - 1)).to_bytes(HASH_BYTES)
    return ImageFacts(f"sha-{content}-{bits}", 100, 64, 32, near_hash)


def test_images_that_look_alike():
    one = dataset(pair(1, "a", "b"), pair(2, "c", "d"), c=near("a", 40), d=near("b", 41))
    assert found(one) == {"near_image": ("note", "data", 1, "a ~ c")}
    edited = dataset(pair(1, "a", "b"), b=near("a", 10))
    assert found(edited) == {}
    assert summarize(edited).alike_sides == 1


def test_leaks():
    test = dataset(
        pair("same image", "a2", "t1"),
        pair("same pair, turned", "d", "c", "prompt 2"),
        pair("near", "t2", "t3"),
        name="test",
        a2=facts("a"),
        t2=near("b", 5),
    )
    assert found(CLEAN, test) == {
        "leaked_image": ("problem", "train and test", 3, "a = a2"),
        "leaked_pair": ("problem", "train and test", 1, "2 = same pair, turned: 'prompt 2'"),
        "leaked_near_image": ("problem", "train and test", 1, "b ~ t2"),
        "leaked_prompt": ("note", "train and test", 1, "'prompt 2'"),
    }


def test_unreadable_images_are_no_leak_and_empty_prompts_neither():
    gone = ImageFault("image_not_found", "image_uri 'a': no such file")
    train = dataset(image(1, "a", 1), image(2, "b", 0), name="train", a=gone)
    test = dataset(image(1, "a", 1), image(2, "c", 0), name="test", a=gone)
    assert not {one.name for one in find(train, test)} - {"unreadable_image", "empty_prompt"}


def test_a_pair_of_labelled_images_leaks_into_a_test_of_pairs():
    train = dataset(image(1, "a", 1, "x"), image(2, "b", 0, "y"), name="train")
    assert set(found(train, dataset(pair(1, "a", "z"), name="test"))) == {"leaked_image"}


def test_examples_are_limited_and_all_are_counted():
    records = [pair(index, f"a{index}", f"b{index}", "") for index in range(9)]
    (finding,) = find(dataset(*records), max_examples=2)
    assert (finding.count, finding.examples) == (9, ("0", "1"))


def test_many_images_of_one_look_are_counted():
    records = [image(index, f"i{index}", index % 2, "x") for index in range(60)]
    looks = {f"i{index}": ImageFacts(f"sha-{index}", 1, 8, 8, facts("one").near_hash) for index in range(60)}
    assert found(dataset(*records, **looks))["near_image"] == ("note", "data", 60 * 59 // 2, "i0 ~ i1")


def test_prompts_in_examples_are_cut_and_made_harmless():
    text = "\x1b[2J" + "x" * 500
    (finding,) = find(dataset(pair(1, "a", "a", text)))
    assert finding.examples == ("1: '\\x1b[2J" + "x" * 56 + "…'",)


def test_the_counts():
    one = dataset(
        image(1, "a", 1, "four", source="web", key="k1"),
        image(2, "b", 0, "sixsix", source="web", key="k2"),
        image(3, "a", 1, "", source="own", key="k3"),
        image(4, "c", 1, "four", key="k4"),
        c=ImageFault("image_empty", "x"),
    )
    counts = summarize(one)
    assert (counts.records, counts.prompts, counts.prompt_chars) == (4, 3, (4, 6))
    assert (counts.images, counts.unreadable, counts.image_bytes, counts.sides) == (3, 1, 200, (32, 64))
    assert counts.labels == {"0": 1, "1": 3}
    # "key" has as many values as there are records: an id, no category.
    assert counts.groups == {"source": {"(none)": {"1": 1}, "own": {"1": 1}, "web": {"0": 1, "1": 1}}}


def node(name):
    return "p", name


def edges(text):
    return [(node(one), node(other)) for one, other in text.split()]


def test_contradictions_of_a_graph():
    assert contradictions(edges("ab cd ba ab cc")) == edges("ab")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("ab bc ac", []),
        ("ab bc ca", [3]),
        ("ab ba bc", []),
        ("ab bc ca xy yz zw wx", [3, 4]),
        ("ab ba bc ca", []),  # only through a pair in both orders
        ("aa ab", []),
    ],
)
def test_cycles_of_a_graph(text, sizes):
    rings = cycles(edges(text))
    assert sorted(map(len, rings)) == sizes
    known = set(edges(text))
    assert all((one, other) in known for ring in rings for one, other in zip(ring, ring[1:] + ring[:1], strict=True))


def test_a_long_chain_is_no_matter_of_recursion():
    chain = [((("p", str(index))), ("p", str(index + 1))) for index in range(50_000)]
    assert cycles(chain) == []
    (ring,) = cycles([*chain, (("p", "50000"), ("p", "0"))])
    assert len(ring) == 50_001
