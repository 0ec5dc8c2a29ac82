import pytest
from packed_models import trained

import binvit
from binvit.lab.predict import open_packed
from binvit.packed.audit import COLUMNS, PRODUCTS, SOFTMAX, STREAM, audit


def test_bytes_and_parameters_are_complete():
    model = trained(binvit.scheme("gsb", attention_bias="relative"), distilled=True)
    packed = binvit.pack(model)
    report = audit(packed)
    assert tuple(report.table.columns) == COLUMNS
    learned = sum(p.numel() for p in model.parameters())
    assert report.table["parameters"].sum() == learned
    assert report.table["float32_bytes"].sum() == 4 * learned
    assert report.table["bytes"].sum() == sum(packed.nbytes.values())
    for part in ("1-bit weights", "attention bias", "patch embedding", "heads", "norms", "shifts"):
        assert report.table.loc[part, "bytes"] == packed.nbytes[part]
    assert report.totals["bytes"] < report.file_bytes < report.float32_file_bytes


def test_operations_of_a_small_model():
    tokens, width = 18, 48
    report = audit(binvit.pack(trained("gsb", distilled=True)))
    table = report.table
    products = 2 * tokens * (width * 3 * width + width * width + 2 * width * 4 * width)
    assert table.loc["1-bit weights", "binary_ops"] == products
    assert table.loc[PRODUCTS, "binary_ops"] == 2 * 3 * tokens * tokens * 16 * (1 + 9)
    assert table.loc["patch embedding", "float_ops"] == 16 * 48 * width
    assert table.loc["heads", "float_ops"] == 2 * width * 5
    assert table.loc["norms", "float_ops"] == 5 * 4 * tokens * width
    assert report.totals["ops"] == table["binary_ops"].sum() / 64 + table["float_ops"].sum()


@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme_is_counted(name):
    model = trained(name, steps=1)
    report = audit(binvit.pack(model, exact=True))
    assert report.table["parameters"].sum() == sum(p.numel() for p in model.parameters()) + sum(
        buffer.numel() for key, buffer in model.named_buffers() if key.endswith("sharpness")
    )
    assert (report.table["binary_ops"].sum() > 0) == (name != "float")
    assert (report.table >= 0).all().all()
    assert "OPs" in str(report)


def audit_of(scheme, **options):
    return audit(binvit.pack(trained(scheme, steps=1, depth=1, **options), exact=True)).table


def test_three_maps_are_three_products_and_comparisons():
    entries = 3 * 17 * 17
    one, three = (audit_of(binvit.scheme("bibert", attention=rule)) for rule in ("half_max", "three_maps"))
    assert (three - one).loc[PRODUCTS, "binary_ops"] == 2 * entries * 16
    assert (three - one).loc[SOFTMAX, "float_ops"] == 2 * entries


def test_context_residuals_and_layer_scales_are_counted():
    elements = 17 * 48
    plain, context = (audit_of(binvit.scheme("bibert", context_residual=on)) for on in (False, True))
    assert (context - plain).loc[STREAM, "float_ops"] == 3 * elements
    assert (audit_of("bibert", init_values=0.1) - plain).loc["norms", "float_ops"] == 2 * elements


def test_parts_of_blocks_are_counted():
    tokens, width = 16, 48
    whole = {"class_token": False, "global_pool": "avg"}
    outputs, plain = tokens * (3 * width + width + 4 * width + width), audit_of("bibert", **whole)

    def more(column="float_ops", **fields):
        return audit_of(binvit.scheme("bibert", **fields), **whole).sub(plain, fill_value=0)[column]

    assert more(norm="after")["norms"] == 4 * outputs
    assert more("parameters", norm="after")["norms"] == 2 * 9 * width
    assert more(norm="before")["norms"] == 4 * tokens * 5 * width
    assert more(own_input=True)[STREAM] == outputs + tokens * 4 * width  # fc2 averages its wider input first
    assert more(layer_activation="clip")["activation functions"] == 2 * outputs
    assert more(layer_activation="rprelu")["activation functions"] == 3 * outputs
    assert more("parameters", output_factor=True)["weight scales"] == 9 * width
    assert more(output_factor=True)["weight scales"] == outputs
    assert more(layer_scale=True)["norms"] == 2 * 2 * tokens * width
    assert more(activation="none")["activation functions"] == -tokens * 4 * width
    assert more(separate_qkv=True)["activation scales"] == 2 * tokens * width
    pool, shift = (
        audit_of(binvit.scheme("bibert", branches=kind), **whole).loc["branches"] for kind in ("pool", "shift")
    )
    assert pool["float_ops"] == (2 * (3 + 1) + 2 * (5 + 1) + 4 * 3) * tokens * width
    assert shift["float_ops"] == (2 * (3 + 1) + 2 * (5 + 1) + 6 * 3) * tokens * width
    assert (pool["parameters"], shift["parameters"]) == (4 * 2 * width, 6 * 2 * width)


@pytest.mark.parametrize("include_prefix", [False, True])
def test_attention_pooling_is_counted(include_prefix):
    width, tokens = 48, 17 if include_prefix else 16
    pooled = audit_of("bibert", global_pool="map", pool_include_prefix=include_prefix)["float_ops"]
    more = pooled - audit_of("bibert")["float_ops"]
    assert more["heads"] == (2 * tokens + 1 + 1 + 4 + 4) * width**2
    assert more["biases"] == (2 * tokens + 1 + 1 + 4 + 1) * width
    assert more[PRODUCTS] == 2 * tokens * width
    assert more[SOFTMAX] == 3 * 3 * tokens
    assert (more["norms"], more["activation functions"], more[STREAM]) == (4 * width, 4 * width, width)


def test_float_parts_are_float_operations():
    whole = audit(binvit.pack(trained("gsb"))).table
    part = audit(binvit.pack(trained(binvit.scheme("gsb", components=["mlp"])))).table
    assert (
        part.loc["float weights", "float_ops"] + part.loc["1-bit weights", "binary_ops"]
        == (whole.loc["1-bit weights", "binary_ops"])
    )
    assert part.loc[PRODUCTS, "binary_ops"] == 0


def test_files(tmp_path):
    packed = binvit.pack(trained("gsb"))
    path = binvit.save(packed, tmp_path / "model.safetensors")
    report = audit(open_packed(path))
    assert report.file_bytes == path.stat().st_size
    assert report.table.equals(audit(packed).table)
    with pytest.raises(FileNotFoundError, match="There is no model"):
        open_packed(tmp_path / "nowhere")
    path.write_bytes(b"poem")
    with pytest.raises(ValueError, match="truncated"):
        open_packed(path)


@pytest.mark.parametrize("bias", ["relative", "none"])
def test_a_packed_deit_small_is_at_most_five_percent_of_float32(bias):
    import timm
    import torch

    model = timm.create_model("deit_small_distilled_patch16_224", num_classes=100)
    model = binvit.binarize(model, binvit.scheme("gsb", attention_bias=bias))
    report = audit(binvit.pack(binvit.calibrate(model, torch.randn(1, 3, 224, 224))))
    assert report.file_bytes < 0.05 * report.float32_file_bytes


def test_command_line(tmp_path):
    from click.testing import CliRunner

    from binvit.__main__ import cli

    path = binvit.save(binvit.pack(trained("gsb")), tmp_path / "model.safetensors")
    result = CliRunner().invoke(cli, ["audit", str(path)])
    assert result.exit_code == 0
    assert "1-bit weights" in result.output
    assert f"file: {path.stat().st_size:,} bytes" in result.output
    assert isinstance(CliRunner().invoke(cli, ["audit", str(tmp_path / "nowhere")]).exception, FileNotFoundError)
