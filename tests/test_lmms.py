"""tools/lmms.py against a stand-in of lmms-eval's interface, for the harness itself is large and optional."""
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from helpers import ROOT, picture, tiny_model


@pytest.fixture
def adapter(monkeypatch):
    """The module, imported beside a harness of which only the base class exists."""
    class lmms:
        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = lmms
    monkeypatch.delitem(sys.modules, "tools.lmms", raising=False)
    from tools import lmms
    return lmms


def test_requests_are_answered_in_their_order_as_generate_would(adapter, tmp_path):
    """Two tasks of unequal limits, one document without a picture, batches that do not divide the requests."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    shown = [picture(40, 20), None, picture(20, 40)]
    docs = [{"image": image, "question": f"What is {name}?"} for image, name in zip(shown, ("Apple", "Pear", "Plum"))]
    see = lambda doc: [doc["image"]] if doc["image"] else []
    lm = adapter.Adapter(str(tmp_path / "model"), batch_size="2", device="cpu")
    lm.task_dict = {"a": {"test": docs}, "b": {"test": docs}}
    requests = [SimpleNamespace(args=(docs[i]["question"], {"max_new_tokens": limit}, see, i, task, "test"))
                for task, limit in (("a", 3), ("b", 5)) for i in (2, 0, 1)]
    expected = [model.generate([shown[i]], [docs[i]["question"]], limit)[0] for limit in (3, 5) for i in (2, 0, 1)]
    assert lm.generate_until(requests) == expected and len(set(expected)) > 3


def test_every_release_is_told_where_the_adapter_is(adapter):
    """0.3, then 0.4, then 0.6 with a registry that lists nothing it was not given as a manifest."""
    given = []
    old, middle = SimpleNamespace(AVAILABLE_MODELS={}), SimpleNamespace(AVAILABLE_SIMPLE_MODELS={})
    new = SimpleNamespace(ModelManifest=lambda **named: named, AVAILABLE_SIMPLE_MODELS={}, AVAILABLE_MODELS={},
                          MODEL_REGISTRY_V2=SimpleNamespace(register_manifest=given.append))
    for models in (old, middle, new):
        adapter.register(models)
    assert old.AVAILABLE_MODELS == middle.AVAILABLE_SIMPLE_MODELS == {"llava_vr": "lmms_adapter.Adapter"}
    assert given == [{"model_id": "llava_vr", "simple_class_path": "lmms_adapter.Adapter"}]


def test_without_the_harness_it_says_what_to_install():
    run = subprocess.run([sys.executable, "-c", "import sys; sys.modules['lmms_eval'] = None; import tools.lmms"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("tools.lmms: lmms-eval is not installed")
    assert "pip install lmms-eval==0.3.5" in run.stderr and run.stderr.count("\n") == 1
