"""`omninft pretrain`: from nothing to an `LTX2Pipeline` folder, in stages that are kept, so that a run can go on.

Each stage writes its result under the work folder by a temporary name and a rename; a stage whose result is there is
not run again. The transformer, the long stage, is checkpointed on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
)
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from safetensors.torch import load_file, save_file

from omninft.checkpoint.store import CheckpointStore, flatten_optimizer, restore_optimizer
from omninft.distributed import available_cores
from omninft.files import replacing, replacing_folder
from omninft.models.loading import CLIP_FILE, ClipDefaults
from omninft.pretrain import autoencoders, text
from omninft.pretrain.flow import Encoded, FlowTraining
from omninft.pretrain.sizes import SIZES, Size
from omninft.worlds import bounce
from omninft.worlds.bounce import all_attributes
from omninft.worlds.dataset import Defects, world_batch
from omninft.worlds.wording import wordings

# The sound of part of the training clips is out of time or miscounted, as the sound of web video is.
DEFECTS = Defects(out_of_time=0.4, min_shift=0.06, max_shift=0.25, miscounted=0.1)
CHECKPOINT_STEPS = 200

# progress(stage, step, total, metrics)
Progress = Callable[[str, int, int, dict[str, float]], None]

_AUTOENCODERS: dict[str, tuple[Any, Any]] = {
    "vae": (autoencoders.train_video_vae, AutoencoderKLLTX2Video),
    "audio_vae": (autoencoders.train_audio_vae, AutoencoderKLLTX2Audio),
    "vocoder": (autoencoders.train_vocoder, LTX2Vocoder),
}


def pretrain(size_name: str, work: Path, output: Path, seed: int, device: str, progress: Progress) -> Path:
    """Train every part that is not in `work` yet and write the pipeline folder `output`; returns it."""
    size = SIZES[size_name]
    work.mkdir(parents=True, exist_ok=True)
    _train_autoencoders(size, work, seed, progress)
    vae, audio_vae, vocoder = (_AUTOENCODERS[name][1].from_pretrained(work / name) for name in _AUTOENCODERS)
    tokenizer, encoder = text.build_tokenizer(), text.build_text_encoder(seed)
    data = _encode(size, work, seed, vae, audio_vae, tokenizer, encoder, progress)
    training = _train_transformer(size, work, seed, device, data, progress)
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        connectors=training.average["connectors"].cpu(),
        transformer=training.average["transformer"].cpu(),
        vocoder=vocoder,
    )
    return save_pipeline(pipeline, output)


def save_pipeline(pipeline: LTX2Pipeline, output: Path) -> Path:
    """Write a pipeline folder in bfloat16, whole or not at all."""
    pipeline.to(torch.bfloat16)
    # transformers loads in the file's dtype, diffusers in float32: a bfloat16 text encoder beside a float32
    # transformer is what `from_pretrained` without a dtype would give, and it does not run.
    pipeline.text_encoder.float()
    defaults = ClipDefaults(bounce.NUM_FRAMES, bounce.HEIGHT, bounce.WIDTH, bounce.FRAME_RATE, first_frame_crf=0)
    with replacing_folder(output) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        (temporary / CLIP_FILE).write_text(json.dumps(asdict(defaults)), encoding="utf-8")
    return output


def _train_autoencoders(size: Size, work: Path, seed: int, progress: Progress) -> None:
    """The three small models, two at a time where there are cores for it."""
    missing = [name for name in _AUTOENCODERS if not (work / name).is_dir()]
    if not missing:
        return
    steps = {"vae": size.vae_steps, "audio_vae": size.audio_vae_steps, "vocoder": size.vocoder_steps}
    cores = available_cores()
    workers = min(2, cores, len(missing))
    threads = max(1, cores // workers)
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(workers, mp_context=context) as pool:
        queue = manager.Queue()
        jobs = [
            pool.submit(_autoencoder_job, name, steps[name], size.autoencoder_clips, work, seed, threads, queue)
            for name in missing
        ]
        while not all(job.done() for job in jobs) or not queue.empty():
            try:
                progress(*queue.get(timeout=0.5))
            except Exception as error:  # queue.Empty crosses the process boundary as its own class
                if type(error).__name__ != "Empty":
                    raise
        for job in jobs:
            job.result()


def _autoencoder_job(name: str, steps: int, clips: int, work: Path, seed: int, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    data = world_batch(clips, seed + 1)
    train = _AUTOENCODERS[name][0]
    model = train(data, steps, seed, lambda step, terms: queue.put((name, step, steps, terms)))
    with replacing_folder(work / name) as temporary:
        model.save_pretrained(temporary)


def _encode(
    size: Size, work: Path, seed: int, vae: Any, audio_vae: Any, tokenizer: Any, encoder: Any, progress: Progress
) -> Encoded:
    """Latents of the training clips and text states of every caption, kept in one file."""
    path = work / f"encoded-{size.clips}.safetensors"
    if path.is_file():
        return Encoded(**load_file(path))
    captions = ["", *sorted({av for a in all_attributes() for *_, av in wordings(a)})]
    rows = {caption: i for i, caption in enumerate(captions)}
    states, mask = text.encode_captions(encoder, tokenizer, captions)
    video, audio, caption = [], [], []
    chunk = 512
    for done in range(0, size.clips, chunk):
        batch = world_batch(min(chunk, size.clips - done), seed + 1000 + done, DEFECTS)
        z = autoencoders.encode_video(vae, batch.video)
        mean, std = (t.view(1, -1, 1, 1, 1) for t in (vae.latents_mean, vae.latents_std))
        video.append(LTX2Pipeline._pack_latents((z - mean) / std))
        audio.append(
            (autoencoders.encode_audio(audio_vae, batch.waveforms) - audio_vae.latents_mean) / audio_vae.latents_std
        )
        caption.append(torch.tensor([rows[c] for c in batch.captions]))
        progress("encode", min(done + chunk, size.clips), size.clips, {})
    data = Encoded(torch.cat(video), torch.cat(audio), states, mask, torch.cat(caption))
    with replacing(path) as temporary:
        save_file({k: v.contiguous() for k, v in vars(data).items()}, temporary)
    return data


def _train_transformer(
    size: Size, work: Path, seed: int, device: str, data: Encoded, progress: Progress
) -> FlowTraining:
    training = FlowTraining(size, seed)
    training.modules.to(device)
    training.average.to(device)
    data = Encoded(**{k: v.to(device) for k, v in vars(data).items()})
    store = CheckpointStore(work / f"transformer-{size.name}", keep_last=2)
    fingerprint = {"size": repr(size), "seed": str(seed), "defects": repr(DEFECTS)}
    latest = store.latest()
    if latest is not None:
        saved = store.load(latest, fingerprint)
        training.modules.load_state_dict(saved.tensors["modules"])
        training.average.load_state_dict(saved.tensors["average"])
        restore_optimizer(training.optimiser, saved.tensors["optimiser"], saved.state["optimiser"])
        training.step = saved.step
    total = size.transformer_steps
    while training.step < total:
        stop = min(total, training.step + CHECKPOINT_STEPS)
        training.run(data, lambda step, terms: progress("transformer", step, total, terms), stop=stop)
        tensors, state = flatten_optimizer(training.optimiser)
        parts = {"modules": training.modules.state_dict(), "average": training.average.state_dict()}
        store.save(training.step, parts | {"optimiser": tensors}, {"optimiser": state}, fingerprint)
    return training
