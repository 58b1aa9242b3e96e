from hfq.graph.select import first_match, matches, unused


def test_whole_components_only():
    assert matches("model.layers.1.mlp.down_proj", "layers.1")
    assert not matches("model.layers.10.mlp.down_proj", "layers.1")
    assert matches("lm_head", "lm_head")
    assert not matches("lm_head_2", "lm_head")
    assert matches("a.mlp.down_proj", "mlp.down_proj")
    assert not matches("a.mlp.x.down_proj", "mlp.down_proj")


def test_shell_and_regular_expression():
    assert matches("model.layers.3.q_proj", "*.q_proj")
    assert matches("model.layers.3.q_proj", "model.layers.[0-3].*")
    assert matches("model.layers.3.q_proj", r"re:model\.layers\.\d+\..*")
    assert not matches("model.layers.3.q_proj", "re:layers")
    assert not matches("anything", "")


def test_first_and_unused():
    assert first_match("a.b", ["c", "b", "a"]) == "b"
    assert first_match("a.b", ["c"]) is None
    assert unused(["q_proj", "typo"], ["x.q_proj"]) == ["typo"]
