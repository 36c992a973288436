"""The ensemble file: exact, deterministic, what is alike stored once, and unimpressed by hostile input."""

from __future__ import annotations

import resource

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtdog.core.errors import FormatError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.packing.ensemble_file import is_ensemble, load_ensemble, save_ensemble
from qtdog.packing.packed_file import PackedModel, load_packed, save_packed
from qtdog.packing.sizes import ensemble_sizes

SHARED = torch.arange(16, dtype=torch.float32)
ABOUT = {"kind": "eoq", "accuracy": {"source": 0.5, "test": None}}


def member(seed, bits=7):
    """Make a model with a quantized weight, tied floats, and statistics that every member has alike."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, 8, 3), generator=generator, dtype=torch.int8)
    tied = torch.randn(6, generator=generator)
    return PackedModel(
        {"conv.weight": QuantizedTensor(codes, torch.rand(16, generator=generator) + 0.1, QuantSpec(bits, 0))},
        {"conv.bias": torch.randn(16, generator=generator), "mean": SHARED.clone(), "a": tied, "b": tied},
        {"classes": ["x", "y"], "step": seed},
    )


def members(n=3):
    return [member(seed) for seed in range(n)]


@pytest.fixture
def path(tmp_path):
    save_ensemble(tmp_path / "ensemble", members(), ABOUT)
    return tmp_path / "ensemble"


def assert_same(found: PackedModel, expected: PackedModel):
    assert found.metadata == expected.metadata
    assert found.rest.keys() == expected.rest.keys()
    assert found.quantized.keys() == expected.quantized.keys()
    for name, value in expected.rest.items():
        assert torch.equal(found.rest[name], value)
    for name, value in expected.quantized.items():
        assert torch.equal(found.quantized[name].codes, value.codes)
        assert torch.equal(found.quantized[name].scale, value.scale)
        assert found.quantized[name].spec == value.spec


@pytest.mark.parametrize("n", [2, 3, 11, 100])
def test_round_trip_is_exact(tmp_path, n):
    save_ensemble(tmp_path / "x", members(n), ABOUT)
    back = load_ensemble(tmp_path / "x")
    assert back.about == ABOUT
    assert len(back.members) == n
    for found, expected in zip(back.members, members(n), strict=True):
        assert_same(found, expected)


def test_the_same_members_give_the_same_bytes(path, tmp_path):
    reordered = [PackedModel(m.quantized, dict(reversed(m.rest.items())), m.metadata) for m in members()]
    save_ensemble(tmp_path / "again", reordered, ABOUT)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_members_may_differ_in_bits_and_in_what_is_quantized(tmp_path):
    float_member = member(9)
    weight = float_member.quantized["conv.weight"].dequantize()
    mixed = [member(0, 2), member(1, 8), PackedModel({}, float_member.rest | {"conv.weight": weight}, {"step": 9})]
    save_ensemble(tmp_path / "x", mixed, {})
    for found, expected in zip(load_ensemble(tmp_path / "x").members, mixed, strict=True):
        assert_same(found, expected)


def test_what_is_alike_is_stored_once_and_what_is_not_is_not(path):
    back = load_ensemble(path).members
    assert back[0].rest["mean"] is back[1].rest["mean"] is back[2].rest["mean"]
    assert back[0].rest["a"] is back[0].rest["b"]
    assert back[0].rest["a"] is not back[1].rest["a"]
    assert ensemble_sizes(path).shared_bytes == 2 * SHARED.nbytes


def test_sharing_compares_bits_not_numbers(tmp_path):
    models = [PackedModel({}, {"w": torch.tensor([zero]), "x": torch.tensor([zero])}, {}) for zero in (0.0, -0.0)]
    save_ensemble(tmp_path / "x", models, {})
    signs = [torch.signbit(model.rest["w"]).item() for model in load_ensemble(tmp_path / "x").members]
    assert signs == [False, True]


def test_a_quantized_weight_that_is_alike_is_shared_too(tmp_path):
    one, other = member(0), member(1)
    other.quantized["conv.weight"] = member(0).quantized["conv.weight"]
    save_ensemble(tmp_path / "x", [one, other], {})
    back = load_ensemble(tmp_path / "x").members
    assert back[0].quantized["conv.weight"] is back[1].quantized["conv.weight"]
    assert ensemble_sizes(tmp_path / "x").shared_bytes == SHARED.nbytes + 16 * 8 * 3 * 7 // 8 + 16 * 4


def test_metadata_in_common_are_written_once(path):
    metadata = load_packed(path).metadata
    assert metadata == {
        "classes": ["x", "y"],
        "ensemble": ABOUT | {"members": [{"step": 0}, {"step": 1}, {"step": 2}]},
    }


def test_sizes_are_those_on_disk(path, tmp_path):
    first = members()[0]
    plain = {name: value.dequantize() for name, value in first.quantized.items()} | first.rest
    save_packed(tmp_path / "float", {}, plain, first.metadata)
    sizes = ensemble_sizes(path)
    one = (tmp_path / "float").stat().st_size
    assert (sizes.bytes, sizes.float32_bytes, sizes.n_members) == (path.stat().st_size, one, 3)
    assert sizes.float32_models == 1 / sizes.ratio == path.stat().st_size / one


def test_a_single_model_is_no_ensemble(path, tmp_path):
    first = members()[0]
    save_packed(tmp_path / "single", first.quantized, first.rest, first.metadata)
    assert is_ensemble(path)
    assert not is_ensemble(tmp_path / "single")
    for read in (load_ensemble, ensemble_sizes):
        with pytest.raises(FormatError, match="one model, no ensemble"):
            read(tmp_path / "single")


@pytest.mark.parametrize("n", [0, 1, 101])
def test_too_few_or_too_many_members_are_refused(tmp_path, n):
    with pytest.raises(FormatError, match=f"2 to 100 members, not {n}"):
        save_ensemble(tmp_path / "x", members(n), ABOUT)


def test_members_that_do_not_fit_together_are_refused(tmp_path):
    more, longer = member(1), member(1)
    more.rest["extra"] = torch.zeros(2)
    longer.rest["conv.bias"] = torch.zeros(17)
    for other, message in ((more, "'extra' is nothing in member 0"), (longer, r"\(17,\) in member 1")):
        with pytest.raises(FormatError, match=message):
            save_ensemble(tmp_path / "x", [member(0), other], ABOUT)
    with pytest.raises(FormatError, match="members 0 and 2 are the same model"):
        save_ensemble(tmp_path / "x", [member(0), member(1), member(0)], ABOUT)
    with pytest.raises(FormatError, match="a meaning of their own"):
        save_ensemble(tmp_path / "x", members(), ABOUT | {"members": []})
    assert not (tmp_path / "x").exists()


def test_truncated_anywhere_is_refused(path, tmp_path):
    content, broken = path.read_bytes(), tmp_path / "broken"
    for end in [*range(0, len(content), 50), len(content) - 1]:
        broken.write_bytes(content[:end])
        for read in (load_ensemble, ensemble_sizes):
            with pytest.raises(FormatError, match="broken"):
                read(broken)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**9), st.integers(0, 255))
def test_any_flipped_byte_is_refused_or_gives_sound_members(path, position, value):
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    altered = path.with_name("altered")
    altered.write_bytes(content)
    try:
        back = load_ensemble(altered)
    except FormatError:
        return
    for found in back.members:
        assert {name: value.shape for name, value in found.rest.items()} == {
            name: value.shape for name, value in back.members[0].rest.items()
        }
        weight = next(iter(found.quantized.values()))
        assert weight.codes.amin() >= weight.spec.qmin
        assert (weight.scale > 0).all()


def ensemble(description):
    return description["metadata"]["ensemble"]


def rename_bias(description, new):
    description["rest"][new] = description["rest"].pop("members.1.conv.bias")


HOSTILE = {
    "no object": (lambda h, d: d["metadata"].update(ensemble=[1]), "should list 2 to 100 members"),
    "no members": (lambda h, d: ensemble(d).pop("members"), "should list 2 to 100 members"),
    "members no objects": (lambda h, d: ensemble(d).update(members=[1, 2, 3]), "as objects"),
    "one member": (lambda h, d: ensemble(d).update(members=[{}]), "found 1 entries"),
    "a thousand members": (lambda h, d: ensemble(d).update(members=[{}] * 1000), "found 1000 entries"),
    "a member too many": (lambda h, d: ensemble(d)["members"].append({}), "member 3 should have the tensors"),
    "a member too few": (lambda h, d: ensemble(d)["members"].pop(), "belongs to none of the 2 members"),
    "a name without member": (lambda h, d: rename_bias(d, "conv.bias"), "belongs to none"),
    "a leading zero": (lambda h, d: rename_bias(d, "members.01.conv.bias"), "belongs to none"),
    "a negative member": (lambda h, d: rename_bias(d, "members.-1.conv.bias"), "belongs to none"),
    "another name": (lambda h, d: rename_bias(d, "members.1.conv.bios"), "member 1 should have"),
    "another shape": (lambda h, d: d["rest"]["members.2.conv.bias"].update(shape=[4, 4]), "member 2 should have"),
    "an alias of another shape": (
        lambda h, d: d["aliases"].update({"members.1.mean": "members.0.a"}), "member 1 should have",
    ),
    "alias to nothing": (lambda h, d: d["aliases"].update({"members.1.mean": "members.7.mean"}), "further name"),
    "other version": (lambda h, d: d.update(format_version=9), "like the file, found 9"),
    "a tensor with huge shape": (lambda h, d: d["rest"]["members.0.conv.bias"].update(shape=[2**50]), "is impossible"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_before_memory_is_taken(path, name, rewrite):
    change, message = HOSTILE[name]
    rewrite(path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=message) as caught:
        load_ensemble(path)
    assert str(path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    with pytest.raises(FormatError, match=message):
        ensemble_sizes(path)


def test_a_member_that_stores_nothing_of_its_own_is_refused(path, rewrite):
    """A short file must not stand for many networks."""

    def copies(header, description):
        ensemble(description)["members"].append({})
        names = ("conv.weight", "conv.bias", "mean", "a", "b")
        owners = description["aliases"]
        for name in names:
            owner = owners.get(f"members.0.{name}", f"members.0.{name}")
            owners[f"members.3.{name}"] = owner

    rewrite(path, copies)
    with pytest.raises(FormatError, match="member 3 should store something of its own"):
        load_ensemble(path)
