from small_run import save_small_model


def test_an_exported_model_can_be_imported_again(printed, tmp_path):
    save_small_model(tmp_path / "model")
    out, back = tmp_path / "out", tmp_path / "back"
    assert printed("export", "hf", out, "--model", tmp_path / "model").startswith(f"{out}: a model for transformers")
    assert printed("import", "hf", out, "--out", back) == f"{back}: a model folder, for --model\n"
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
