"""Lets lmms-eval itself run a checkpoint of ours, for results that must come from that harness.

    pip install lmms-eval==0.3.5
    python -m tools.lmms --model llava_vr --model_args pretrained=runs/0.5b/phase2 \\
        --tasks chartqa,ai2d --batch_size 16 --output_path logs
    accelerate launch --num_processes=8 -m tools.lmms --model llava_vr \\
        --model_args pretrained=runs/0.5b/phase2 --tasks chartqa

All flags are lmms-eval's. It fetches data sets itself; eval.py needs none of this. Tried with
0.3.5, 0.5.0, 0.6.0 and 0.7.3: each gave the answers of eval.py. 0.7.3 stops beside filelock 4:
pip install "filelock<4".

eval.py follows the rules of v0.3.4. 0.3.5 scores two otherwise: all open questions of MMMU count 0,
and ScienceQA takes "A. text" for A. 0.7.3 counts the open questions again, keeps that of ScienceQA
and reads MMStar, OCRBench and RealWorldQA by rules of its own. Where that matters:
pip install git+https://github.com/EvolvingLMMs-Lab/lmms-eval@v0.3.4
"""
import sys
from itertools import groupby

import torch

from model import LLaVAVR

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    sys.exit(f"tools.lmms: lmms-eval is not installed, or lacks a part ({error}); "
             "pip install lmms-eval==0.3.5, or use eval.py, which needs no harness")


class Adapter(lmms):
    """Our model under the interface of lmms-eval.

    Greedy; `until` is not applied, as in LLaVA's own wrappers there.
    """

    def __init__(self, pretrained, batch_size=1, device=None, dtype=None, **_):
        super().__init__()
        self.batch = int(batch_size)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if torch.distributed.is_torchelastic_launched():
            from accelerate import Accelerator              # lmms-eval brings it
            self.accelerator = Accelerator()
            self.device = self.accelerator.device
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        dtype = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        model = LLaVAVR.from_pretrained(pretrained, getattr(torch, dtype))
        self._model = model.to(self.device)

    def generate_until(self, requests):
        """Requests of (question, settings, doc -> pictures, doc id, task, split) -> answers, in
        their order."""
        answers = []
        for _, group in groupby(requests, key=task_of):             # one task has one limit
            group = list(group)
            for start in range(0, len(group), self.batch):
                answers += self._answer(group[start:start + self.batch])
        return answers

    def _answer(self, requests):
        """One batch."""
        pictures, questions = [], []
        for request in requests:
            question, _, see, doc, task, split = request.args
            questions.append(question)
            pictures.append(see(self.task_dict[task][split][doc]))
        settings = requests[0].args[1]
        return self._model.generate(pictures, questions, settings.get("max_new_tokens", 1024))

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("conversations of several rounds: "
                                  "none of the paper's benchmarks has them")

    def loglikelihood(self, requests):
        raise NotImplementedError("likelihoods of given answers: "
                                  "none of the paper's benchmarks asks for them")


def task_of(request):
    """Name of the task that a request belongs to."""
    return request.args[4]


def register(models):
    """Tell the module lmms_eval.models where the adapter is, in the way of its release."""
    place = "lmms_adapter.Adapter"
    if hasattr(models, "MODEL_REGISTRY_V2"):                            # 0.6 and later
        manifest = models.ModelManifest(model_id="llava_vr", simple_class_path=place)
        models.MODEL_REGISTRY_V2.register_manifest(manifest)
    elif hasattr(models, "AVAILABLE_SIMPLE_MODELS"):                    # 0.4 and 0.5
        models.AVAILABLE_SIMPLE_MODELS["llava_vr"] = place
    else:
        models.AVAILABLE_MODELS["llava_vr"] = place


if __name__ == "__main__":
    import lmms_eval.models
    from lmms_eval.__main__ import cli_evaluate
    sys.modules["lmms_adapter"] = sys.modules["__main__"]           # one class, whoever imports it
    register(lmms_eval.models)
    cli_evaluate()
