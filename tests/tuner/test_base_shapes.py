"""The shapes that an adapter was made for, as its configuration keeps them."""

from randbasis.tuner.base_shapes import compress_shapes, expected_shape, generic_path


def test_layers_of_one_shape_share_an_entry():
    shapes = {"layers.0.q": (8, 4), "layers.1.q": (8, 4), "layers.10.q": (8, 4), "head": (3, 8)}
    assert compress_shapes(shapes) == {"layers.*.q": [8, 4], "head": [3, 8]}


def test_layers_of_several_shapes_keep_one_each():
    shapes = {"layers.0.q": (8, 4), "layers.1.q": (6, 4), "layers.0.o": (4, 8), "layers.1.o": (4, 8)}
    kept = compress_shapes(shapes)
    assert kept == {"layers.0.q": [8, 4], "layers.1.q": [6, 4], "layers.*.o": [4, 8]}
    assert {key: expected_shape(kept, key) for key in shapes} == shapes
    assert expected_shape(kept, "model.layers.1.q") == (6, 4), "under a wrapper, by the end"
    assert expected_shape(kept, "layers.2.q") is None
    assert expected_shape(None, "layers.0.q") is None


def test_only_whole_words_are_numbers():
    assert generic_path("h.0.c4.attn2.11") == "h.*.c4.attn2.*"
