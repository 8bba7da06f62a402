"""Attacks on the promises of the Python API and of the ops: `OMP_NUM_THREADS=1 python tests/attacks/engine.py [words]`.

Every attack_* is a case: it asserts what is promised. A line a case, held or FELL with the reason, and the counts at the end.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import os
import pickle
import random
import signal
import sys
import threading
import time
import warnings
import weakref

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dtta_fast
from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.kernels import Pairs, add_noise, denoising_loss, denoising_loss_and_gradient, mix_condition, native, reference
from dtta_fast.tasks import Classification

K = 7
CONFIG = AdaptConfig(steps=2, pairs=2, lr=1e-2)
ONLINE = CONFIG.replace(mode="online")


# ---------------------------------------------------------------------------------------------------------------- small models
@functools.lru_cache(maxsize=1)
def process():
    return NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear"))


def denoiser(dtype=torch.float32, classes=K):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiTNetwork(
            in_channels=3, learn_sigma=False, input_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=classes
        )
        for p in network.parameters():
            nn.init.normal_(p, std=0.2)
    return DiT(network, copy.deepcopy(process())).to(dtype)


class Net(nn.Module):
    def __init__(self, classes=K) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def images(n=3, dtype=torch.float32, size=16):
    return torch.rand(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(2))


def run(model=None, x=None, d=None, ids=None, task=None, config=CONFIG, **changes):
    model, d = Net() if model is None else model, denoiser() if d is None else d
    x = images() if x is None else x
    return adapt(model, d, x, config=config.replace(**changes) if changes else config, image_ids=ids, task=task)


@functools.lru_cache(maxsize=1)
def base():
    return run()


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)


def moved(found):
    assert (found.outputs - found.outputs_before).abs().max() > 1e-4, "nothing moved"


def refused(call, *kinds, mention=()):
    """The call raises one of these errors, whose text holds one of `mention`."""
    kinds = kinds or (ValueError, TypeError)
    try:
        found = call()
    except Exception as error:
        text = str(error)
        assert isinstance(error, kinds), f"raised {type(error).__name__}: {text[:200]} (wanted {[k.__name__ for k in kinds]})"
        words = (mention,) if isinstance(mention, str) else mention
        assert not words or any(word in text for word in words), f"the error names none of {words}: {text[:200]}"
        return text
    raise AssertionError(f"was taken: {str(found)[:120]}")


def parts_of(*modules):
    kept = []
    for module in modules:
        for name, part in module.named_modules():
            kept += [(name, part.training, [id(p) for p in part._parameters.values()], [id(b) for b in part._buffers.values()])]
            kept += [(len(part.__dict__.get("_forward_hooks", ())), len(part.__dict__.get("_forward_pre_hooks", ())), sorted(vars(part)))]
        for p in (*module.parameters(), *module.buffers()):
            if isinstance(p, nn.parameter.UninitializedTensorMixin):
                kept += [(type(p).__name__, p.requires_grad)]
                continue
            value = p.detach().clone()
            kept += [(value, p.requires_grad, None if p.grad is None else p.grad.clone(), p._version if not p.is_inference() else 0)]
    return kept


def equal(a, b):
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
            return False
        same = torch.equal(a.float(), b.float()) if a.dtype == torch.float8_e4m3fn else torch.equal(a, b)
        return same or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@contextlib.contextmanager
def untouched(*modules):
    before, process_before = parts_of(*modules), surroundings()
    yield
    assert equal(before, parts_of(*modules)), "a module of the caller's was changed"
    same_surroundings(process_before)


def surroundings():
    m = torch.nn.modules.module
    cuda = torch.backends.cuda
    return {
        "torch rng": torch.get_rng_state().numpy().tobytes(), "numpy rng": np.random.get_state()[1].tobytes(), "python rng": random.getstate(),
        "default dtype": torch.get_default_dtype(), "default device": torch.get_default_device(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(), "threads": torch.get_num_threads(), "matmul": torch.get_float32_matmul_precision(),
        "sdp": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "modes": torch._C._len_torch_function_stack(), "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "functorch": torch._C._functorch.get_dynamic_layer_stack_depth(), "gc": gc.isenabled(), "limit": sys.getrecursionlimit(),
        "filters": len(warnings.filters), "sigint": signal.getsignal(signal.SIGINT), "hooks": len(m._global_forward_hooks),
        "pre hooks": len(m._global_forward_pre_hooks), "environment": dict(os.environ), "trace": sys.gettrace(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(), "mkldnn": torch.backends.mkldnn.enabled,
        "threads alive": sum(not t.daemon for t in threading.enumerate()),
    }  # fmt: skip


def same_surroundings(before):
    after = surroundings()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"changed: {changed}"


def in_child(work, seconds=60):
    """Runs in a forked child: its memory may be corrupted, its switches may stay. Raises what it raised; a signal is a fall."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, text = 0, ""
        try:
            signal.alarm(seconds)
            work()
        except BaseException as error:
            code, text = 1, f"{type(error).__name__}: {error}"
        os.write(writer, text.encode()[:4000])
        os._exit(code)
    os.close(writer)
    text = b""
    while part := os.read(reader, 4096):
        text += part
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFSIGNALED(status), f"the process died of signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 0, text.decode()


# ------------------------------------------------------------------------------------------- 1: what surrounds a call
class PassingFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class PassingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(set_, get, value):
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


@contextlib.contextmanager
def no_gc():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def flops():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


CONTEXTS = {
    "no_grad": torch.no_grad,
    "grad_disabled": lambda: torch.set_grad_enabled(False),
    "autocast_bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True),
    "default_double": lambda: setting(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "default_bf16": lambda: setting(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "device_meta": lambda: torch.device("meta"),
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "saved_tensors_hooks_that_pack": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: (x.clone(),), lambda x: x[0]),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "disabled_saved_tensors_hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "function_mode": PassingFunctions,
    "dispatch_mode": PassingDispatch,
    "flop_counter": flops,
    "no_gc": no_gc,
    "strict_warnings": strict_warnings,
    "matmul_medium": lambda: setting(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "medium"),
    "two_threads": lambda: setting(torch.set_num_threads, torch.get_num_threads, 2),
    "flash_alone": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    "dual_level": torch.autograd.forward_ad.dual_level,
    "one_thread_of_autograd": lambda: torch.autograd.set_multithreading_enabled(False),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "recursion_limit": lambda: setting(sys.setrecursionlimit, sys.getrecursionlimit, 400),
    "inference_mode_off": lambda: torch.inference_mode(False),
    "fork_rng": torch.random.fork_rng,
    "no_fast_path": lambda: setting(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled, False),
    "no_mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
}


def _within(context):
    expected = base()
    model, d, x = Net().train(), denoiser().train(), images()
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with context(), untouched(model, d):
            found = adapt(model, d, x, config=CONFIG)
    close(found.outputs, expected.outputs, 1e-4)
    close(found.loss, expected.loss, 1e-4)
    assert torch.equal(found.predictions, expected.predictions)
    assert not found.outputs.requires_grad and found.outputs.grad_fn is None


for _name, _context in CONTEXTS.items():
    globals()[f"attack_within_{_name}"] = functools.partial(_within, _context)


def attack_within_a_functorch_vmap():
    """Either the plain result, or an error, and no trace of it."""
    expected, model, d = base(), Net(), denoiser()
    with untouched(model, d):
        try:
            found = torch.vmap(lambda s: adapt(model, d, images(), config=CONFIG).outputs * s)(torch.ones(2))
            close(found[0], expected.outputs, 1e-4)
        except (RuntimeError, ValueError, TypeError):
            pass
    close(adapt(model, d, images(), config=CONFIG).outputs, expected.outputs)


def attack_within_a_functorch_grad():
    expected, model, d = base(), Net(), denoiser()
    with untouched(model, d):
        try:
            torch.func.grad(lambda s: (adapt(model, d, images(), config=CONFIG).outputs * s).sum())(torch.ones(()))
        except (RuntimeError, ValueError, TypeError):
            pass
    close(adapt(model, d, images(), config=CONFIG).outputs, expected.outputs)


def attack_images_of_a_functorch_vmap():
    model, d = Net(), denoiser()
    session = Adapter(model, d, CONFIG)
    with untouched(model, d), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(RuntimeError, ValueError, TypeError, NotImplementedError):
            torch.vmap(lambda x: session.adapt(x).outputs)(images(2)[:, None])
    close(session.adapt(images()).outputs, base().outputs)


def attack_within_jvp():
    expected, model, d = base(), Net(), denoiser()
    session = Adapter(model, d, CONFIG)
    with untouched(model, d), contextlib.suppress(RuntimeError, ValueError, TypeError, NotImplementedError):
        torch.func.jvp(lambda x: session.adapt(x).outputs, (images(),), (torch.ones(3, 3, 16, 16),))
    close(session.adapt(images()).outputs, expected.outputs)


def attack_a_session_made_under_inference_mode():
    """Only adapt() is said to be refused there: a session that was made there has to work outside."""
    with torch.inference_mode():
        session = Adapter(Net(), denoiser(), CONFIG)
    close(session.adapt(images()).outputs, base().outputs)


def attack_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model = Net()
    close(adapt(model, denoiser(), images(), config=CONFIG).outputs, base().outputs)


def attack_a_model_made_under_inference_mode_of_which_a_part_moves():
    with torch.inference_mode():
        model = Net()
    close(run(model, parameters="norm").outputs, run(parameters="norm").outputs)


def attack_a_denoiser_made_under_inference_mode():
    with torch.inference_mode():
        d = denoiser()
    close(run(d=d).outputs, base().outputs)


def attack_reset_and_load_under_inference_mode():
    session = Adapter(Net(), denoiser(), ONLINE)
    session.adapt(images())
    state = copy.deepcopy(session.state_dict())
    expected = session.adapt(images(2)).outputs
    with torch.inference_mode():
        session.reset()
        session.load_state_dict(state)
    close(session.adapt(images(2)).outputs, expected)


def attack_state_read_under_inference_mode():
    session = Adapter(Net(), denoiser(), ONLINE)
    session.adapt(images())
    with torch.inference_mode():
        buffer = io.BytesIO()
        torch.save(session.state_dict(), buffer)
        state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    other = Adapter(Net(), denoiser(), ONLINE)
    other.load_state_dict(state)
    close(other.adapt(images(2)).outputs, session.adapt(images(2)).outputs)


def attack_gradients_of_the_caller_stay():
    model, d = Net(), denoiser()
    model(images()).sum().backward()
    d.network.x_embedder.proj.weight.grad = torch.ones_like(d.network.x_embedder.proj.weight)
    with untouched(model, d):
        run(model, d=d, denoiser_parameters="all")


def attack_nothing_moves_in_python_s_and_numpy_s_generators():
    import peft  # noqa: F401  # their import changes filters of warnings

    model, d = Net(), denoiser()
    run(parameters="lora", lora_targets=("head",))
    with untouched(model, d):
        run(model, d=d, top_k=2, drawn_classes=2, guard=2, parameters="lora", lora_targets=("head",))


class Bomb:
    """Raises at the n-th line of dtta_fast's or torch's code, as a signal's handler would."""

    def __init__(self, error, at, only=("dtta_fast", "torch")):
        self.error, self.at, self.count, self.only, self.where = error, at, 0, only, None

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def call(self, frame, event, arg):
        file = frame.f_code.co_filename
        return self.line if any(f"{name}/" in file for name in self.only) and "importlib" not in file else None

    def line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
                raise self.error("boom")
        return self.line


def _lines(session, x, only):
    with Bomb(ValueError, -1, only) as bomb:
        session.adapt(x)
    return bomb.count


def _bombed(error, config, tries, only=("dtta_fast", "torch"), seed=0):
    model, d, x = Net().train(), denoiser(), images(2)
    session = Adapter(model, d, config)
    session.adapt(x)
    session.adapt(x)
    if config.mode == "online":
        session.reset()
    lines = _lines(session, x, only)
    if config.mode == "online":
        session.reset()
    expected, source = (getattr(Adapter(model, d, config).adapt(x), name) for name in ("outputs", "outputs_before"))
    draw, wrong = random.Random(seed), []
    for _ in range(tries):
        at = draw.randrange(1, lines + 1)
        before, around = parts_of(model, d), surroundings()
        bomb = Bomb(error, at, only)
        raised = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with bomb:
                    session.adapt(x)
            except BaseException:
                raised = True
        after = surroundings()
        around["trace"] = after["trace"]
        changed = [name for name in around if around[name] != after[name]]
        if changed:
            wrong.append(f"{bomb.where}: changed {changed}")
            torch.set_grad_enabled(True)
        if not equal(before, parts_of(model, d)):
            wrong.append(f"{bomb.where}: the caller's modules")
        if bomb.where and not raised:
            wrong.append(f"{bomb.where}: the exception was swallowed")
        if config.mode == "online" and raised and session.state_dict():
            wrong.append(f"{bomb.where}: an online state was kept")
        session.reset()
        try:
            result = session.adapt(x)
            again = result.outputs
            if not torch.allclose(result.outputs_before, source, rtol=1e-4, atol=1e-5):
                wrong.append(f"{bomb.where}: the next call gives another outputs_before")
            if not torch.allclose(again, expected, rtol=1e-4, atol=1e-5):
                wrong.append(f"{bomb.where}: the next call gives another result, by {float((again - expected).abs().max()):.2g}")
        except Exception as later:
            wrong.append(f"{bomb.where}: the next call raises {type(later).__name__}: {str(later)[:90]}")
            session = Adapter(model, d, config)
            session.adapt(x)
        session.reset()
    assert not wrong, f"{len(wrong)} of {tries}: " + "; ".join(wrong[:4])


def attack_keyboard_interrupts_at_random_lines():
    _bombed(KeyboardInterrupt, CONFIG, 10)


def attack_keyboard_interrupts_at_random_lines_of_our_own():
    _bombed(KeyboardInterrupt, CONFIG, 15, ("dtta_fast",), 5)


def attack_keyboard_interrupts_at_random_lines_online():
    _bombed(KeyboardInterrupt, ONLINE.replace(guard=2), 10, seed=1)


def attack_system_exits_at_random_lines():
    _bombed(SystemExit, CONFIG.replace(denoiser_parameters="all"), 8, seed=2)


def attack_timeouts_at_random_lines():
    """A handler of SIGALRM that raises TimeoutError: an Exception, and no less asynchronous than Ctrl-C."""
    _bombed(TimeoutError, CONFIG, 30, ("dtta_fast", "/nn/utils", "_functorch"), seed=3)


def attack_timeouts_at_random_lines_online():
    _bombed(TimeoutError, ONLINE, 30, ("dtta_fast", "/nn/utils", "_functorch"), seed=4)


def attack_memory_errors_at_random_lines():
    _bombed(MemoryError, CONFIG, 10, seed=6)


def attack_a_timeout_in_a_first_call_is_not_taken_for_a_failing_vmap():
    class Slow(Net):
        def forward(self, x):
            if torch._C._functorch.get_dynamic_layer_stack_depth():
                raise TimeoutError("the caller's own deadline")  # as its SIGALRM handler does
            return super().forward(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(lambda: run(Slow()), TimeoutError)


def attack_a_hook_that_raises_in_the_second_step():
    model, d, calls = Net(), denoiser(), [0]
    session = Adapter(model, d, ONLINE)
    first = session.adapt(images()).outputs
    twin = Adapter(Net(), denoiser(), ONLINE)
    twin.adapt(images())
    state = copy.deepcopy(session.state_dict())

    def bad(*_):
        calls[0] += 1
        if calls[0] == 3:
            raise ZeroDivisionError("hook")

    hooked = Net()
    hooked.head.register_forward_hook(bad)
    online = Adapter(hooked, d, ONLINE)
    online.load_state_dict(state)
    calls[0] = 0
    refused(lambda: online.adapt(images(2)), ZeroDivisionError)
    assert equal_states(online.state_dict(), state)
    calls[0] = 10
    close(online.adapt(images(2)).outputs, twin.adapt(images(2)).outputs)
    assert first.isfinite().all()


def equal_states(a, b):
    from torch.utils import _pytree as pytree

    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def attack_a_task_that_raises_at_the_end():
    class Failing(Classification):
        def predict(self, outputs, size):
            raise OSError("disk full")

    session = Adapter(Net(), denoiser(), ONLINE, Failing())
    refused(lambda: session.adapt(images()), OSError)
    assert session.state_dict() == {}


def attack_a_call_within_a_call():
    holder = {}

    class Calling(Classification):
        def normalise(self, model, crop):
            if "session" in holder:
                refused(lambda: holder["session"].adapt(images()), RuntimeError, mention="in a call")
                refused(lambda: holder["session"].reset(), RuntimeError, mention="in a call")
                refused(lambda: holder["session"].load_state_dict({}), RuntimeError, mention="in a call")
            return super().normalise(model, crop)

    session = Adapter(Net(), denoiser(), CONFIG, Calling())
    holder["session"] = session
    close(session.adapt(images()).outputs, base().outputs)


def attack_memory_with_gc_off():
    session = Adapter(Net(), denoiser(), CONFIG.replace(guard=2))
    x = images()
    for _ in range(3):
        session.adapt(x)
    gc.collect()
    gc.disable()
    try:

        def tensors():
            return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))

        before = tensors()
        for _ in range(6):
            session.adapt(x)
        after = tensors()
    finally:
        gc.enable()
    assert after - before < 20, f"{after - before} tensors stay after 6 calls with gc off"


def attack_a_result_s_memory_is_its_own():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, K))

        def forward(self, x):
            return self.table[: len(x)]

    model = Constant()
    with untouched(model):
        found = run(model, method="diffusion_classifier")
        for value in (found.outputs, found.outputs_before):
            value.zero_()
        found = run(model, parameters="logits")
        for value in (found.outputs, found.outputs_before):
            value.zero_()
        found = run(model, mode="online")
        for value in (found.outputs, found.outputs_before):
            value.zero_()


def attack_a_result_s_memory_is_not_the_state_s():
    session = Adapter(Net(), denoiser(), CONFIG.replace(parameters="logits"))
    found = session.adapt(images())
    kept = found.outputs.clone()
    session.adapt(images().flip(3))
    assert torch.equal(found.outputs, kept)


# ------------------------------------------------------------------------------------------- 2: an image's result is its own
@functools.lru_cache(maxsize=1)
def doubles():
    return (
        Net().double(),
        denoiser(torch.float64),
        images(5, torch.float64),
        run(Net().double(), images(5, torch.float64), denoiser(torch.float64)),
    )


def attack_company_order_and_size():
    model, d, x, whole = doubles()
    for rows in ([4, 0], [2], [3, 3 - 1, 1], [1, 4, 0, 2, 3]):
        rows = torch.tensor(rows)
        found = run(model, x[rows], d, ids=rows)
        close(found.outputs, whole.outputs[rows], 1e-8)


def _company(**changes):
    model, d, x, _ = doubles()
    whole = run(model, x, d, **changes)
    rows = torch.tensor([3, 0])
    close(run(model, x[rows], d, ids=rows, **changes).outputs, whole.outputs[rows], 1e-7)


COMPANY = {
    "noise_mix": {"objective": "noise_mix", "top_k": 2, "drawn_classes": 2},
    "antithetic": {"antithetic": True, "pairs": 4, "chunk": 1},
    "shared_noise": {"share_noise": True, "loss": "l1"},
    "adapting_denoiser": {"denoiser_parameters": "all", "denoiser_lr": 1e-3},
    "lora": {"parameters": "lora", "lora_targets": ("head",), "guard": 3},
    "classifier": {"method": "diffusion_classifier", "top_k": 4, "guard_threshold": 1.0, "pairs": 3},
    "posterior": {"method": "posterior"},
    "logits": {"parameters": "logits", "optimizer": "sgd", "lr": 1.0},
    "budget": {"memory_budget": 6_000_000},
    "null": {"objective": "noise_mix", "null_condition": True, "denoiser_parameters": "all"},
    "decay": {"optimizer": "adamw", "weight_decay": 0.1, "logit_scale": 5.0},
}
for _name, _changes in COMPANY.items():
    globals()[f"attack_company_{_name}"] = functools.partial(_company, **_changes)


def attack_company_that_diverges():
    """An image whose adaptation overflows beside one whose does not."""
    x = images(3)
    noise = torch.randn(3, 2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    alone = adapt(Net(), denoiser(), x[:1], config=CONFIG, noise=noise[:1])
    noise[1] = 3e38
    found = adapt(Net(), denoiser(), x, config=CONFIG, noise=noise)
    assert found.outputs.isfinite().all()
    close(found.outputs[:1], alone.outputs, 1e-4)


def attack_chunks_and_budgets():
    model, d, x, whole = doubles()
    for chunk in (1, 2, 7):
        close(run(model, x, d, chunk=chunk).outputs, whole.outputs, 1e-8)
    close(run(model, x, d, memory_budget=10**15).outputs, whole.outputs, 1e-8)


def attack_history_of_a_session():
    session = Adapter(Net(), denoiser(), CONFIG)
    first = session.adapt(images(1)).outputs
    session.adapt(images(5))
    refused(lambda: session.adapt(images() + 5))
    session.warmup(images(2))
    session.adapt(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    assert torch.equal(session.adapt(images(1)).outputs, first)


def attack_history_of_a_session_s_largest_batch():
    session = Adapter(Net(), denoiser(), CONFIG.replace(denoiser_parameters="all"))
    small = session.adapt(images(2)).outputs
    session.adapt(images(6))
    assert torch.equal(session.adapt(images(2)).outputs, small)


def attack_layouts_of_images():
    expected, x = base().outputs, images()
    wide = torch.zeros(3, 3, 16, 40)
    wide[..., 1:32:2][..., :16] = x
    layouts = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "strided": wide[..., 1:32:2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "from numpy": torch.from_numpy(x.numpy().copy()),
        "flipped twice": x.flip(3).contiguous().flip(3),
        "leaf with gradient": x.clone().requires_grad_(),
        "non-leaf": (x.clone().requires_grad_() * 1),
        "parameter": nn.Parameter(x.clone()),
        "negative bit": torch._neg_view(-x),
        "part of complex": torch.complex(torch.zeros_like(x), -x).conj().imag,
    }
    wrong = [name for name, layout in layouts.items() if not torch.allclose(run(x=layout).outputs, expected, rtol=1e-5, atol=1e-6)]
    assert not wrong, wrong


def attack_layouts_of_latents_noise_and_ids():
    x = images() * 2 - 1
    noise = torch.randn(3, 2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    steps = torch.randint(0, 1000, (3, 2, 2), generator=torch.Generator().manual_seed(1))
    call = functools.partial(adapt, Net(), denoiser(), images(), config=CONFIG)
    expected = call(latents=x, noise=noise, timesteps=steps).outputs
    found = call(
        latents=torch._neg_view(-x).requires_grad_(), noise=torch.complex(torch.zeros_like(noise), -noise).conj().imag,
        timesteps=steps.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        image_ids=torch.arange(6)[::2],
    )  # fmt: skip
    close(found.outputs, expected)
    one = noise[:, :1, :1].expand_as(noise)
    close(call(latents=x, noise=one, timesteps=steps).outputs, call(latents=x, noise=one.contiguous(), timesteps=steps).outputs)


def attack_expanded_images_and_ids():
    one = images(1)
    found = run(x=one.expand(4, -1, -1, -1), ids=torch.tensor([5]).expand(4))
    close(found.outputs, run(x=one, ids=torch.tensor([5])).outputs.expand(4, -1), 1e-4)


def attack_dtypes_of_images():
    bytes_ = (images() * 255).round().to(torch.uint8)
    expected = run(x=bytes_)
    for dtype in (torch.float32, torch.float64):
        close(run(x=bytes_.to(dtype) / 255).outputs, expected.outputs, 1e-3)
    for dtype in (torch.float16, torch.bfloat16):
        half = images().to(dtype)
        close(run(x=half).outputs_before, run(x=half.float()).outputs_before, 1e-2)


def attack_subclass_of_tensor_as_images():
    from torchvision import tv_tensors

    found = run(x=tv_tensors.Image(images()))
    close(found.outputs, base().outputs)
    assert type(found.outputs) is torch.Tensor


def _odd_images(make):
    refused(lambda: run(x=make()), ValueError, TypeError, mention="images")


ODD_IMAGES = {
    "sparse": lambda: images().to_sparse(),
    "csr": lambda: images()[0, 0].to_sparse_csr(),
    "mkldnn": lambda: images().to_mkldnn(),
    "meta": lambda: images().to("meta"),
    "float8": lambda: images().to(torch.float8_e4m3fn),
    "complex": lambda: images().to(torch.complex64),
    "int16": lambda: images().to(torch.int16),
    "uint16": lambda: (images() * 65535).to(torch.uint16),
    "quantised": lambda: torch.quantize_per_tensor(images(), 1 / 255, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([images()[0], images()[1]]),
    "jagged": lambda: torch.nested.nested_tensor([images()[0], images()[1]], layout=torch.jagged),
    "numpy": lambda: images().numpy(),
    "list": lambda: [images()[0]],
    "empty": lambda: images()[:0],
    "no_pixels": lambda: images()[..., :0],
    "grey": lambda: images()[:, :1],
    "single": lambda: images()[0],
    "nan": lambda: images() * torch.nan,
    "inf": lambda: images() / 0,
    "negative": lambda: -images(),
    "one_nan_in_half": lambda: images().half().index_fill(0, torch.tensor(1), torch.nan),
}
for _name, _make in ODD_IMAGES.items():
    globals()[f"attack_images_{_name}_are_refused_by_name"] = functools.partial(_odd_images, _make)


def attack_a_batch_norm_of_batch_statistics():
    """track_running_stats=False: eval mode too takes the batch's. An image's result may not depend on its company."""
    model = Net()
    model.features[1] = nn.BatchNorm2d(8, track_running_stats=False)
    x = images(4)
    try:
        whole = run(model, x)
    except (ValueError, TypeError):
        return  # refused is right, too
    alone = run(model, x[1:2], ids=torch.tensor([1]))
    close(alone.outputs_before, whole.outputs_before[1:2], 1e-4)
    close(alone.outputs, whole.outputs[1:2], 1e-4)


def attack_modes_switched_between_calls():
    model, d = Net().train(), denoiser()
    session = Adapter(model, d, CONFIG)
    first = session.adapt(images()).outputs
    model.eval()
    d.train()
    model.requires_grad_(False)
    assert torch.equal(session.adapt(images()).outputs, first)


def attack_ids_of_the_edge():
    edge = torch.tensor([2**32 - 1, 2**32 - 2, 0])
    found = run(ids=edge)
    assert found.outputs.isfinite().all()
    refused(lambda: run(ids=edge + 1), ValueError, mention="image_ids")
    refused(lambda: run(ids=edge - 1), ValueError, mention="image_ids")
    alone = run(x=images()[:1], ids=edge[:1])
    close(alone.outputs, found.outputs[:1], 1e-4)


def attack_seeds_of_the_edge():
    for seed in (2**63 - 1, 2**62, 2**32):
        assert run(seed=seed, guard=2, top_k=2, drawn_classes=1).outputs.isfinite().all()


# ------------------------------------------------------------------------------------------- 3: unusual models
def as_plain(model, plain=None, tol=1e-4, **changes):
    """Adapts like a plain model of the same function, and leaves it as it was."""
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(model, **changes)
    moved(found)
    close(found.outputs.float(), run(Net() if plain is None else plain, **changes).outputs.float(), tol)


def attack_tied_weights():
    class Tied(nn.Module):
        def __init__(self, tied):
            super().__init__()
            torch.manual_seed(3)
            self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 48)
            self.head = nn.Linear(48, K)
            self.b.weight = self.a.weight if tied else nn.Parameter(self.a.weight.detach().clone())
            self.tied = tied

        def forward(self, x):
            x = F.adaptive_avg_pool2d(x, 4).flatten(1)
            return self.head(F.relu(F.linear(F.relu(self.a(x)), self.a.weight if not self.tied else self.b.weight, self.b.bias)))

    rng = torch.get_rng_state()
    model = Tied(True)
    plain = Tied(False)
    torch.set_rng_state(rng)
    with untouched(model):
        found = run(model)
    moved(found)
    close(found.outputs, run(plain).outputs, 1e-4)


def attack_a_buffer_that_is_a_parameter():
    model = Net()
    model.register_buffer("alias", model.head.weight)
    with untouched(model):
        try:
            found = run(model)
        except (ValueError, TypeError) as error:
            assert "alias" in str(error) or "head.weight" in str(error), f"refused without its name: {error}"
            return
    close(found.outputs, base().outputs)


def attack_a_tensor_that_is_two_buffers():
    model = Net()
    model.register_buffer("scale", torch.ones(()))
    model.head.register_buffer("again", model.scale)
    as_plain(model)


def attack_parametrized_weight_norm():
    model = Net()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with untouched(model):
        found = run(model)
    moved(found)


def attack_parametrized_under_cached():
    model = Net()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with torch.nn.utils.parametrize.cached():
        model(images())
        refused(lambda: run(model), RuntimeError, mention="cached")


def attack_weights_in_a_list_are_told():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Adapter(ByList(), denoiser(), CONFIG)
    assert any("as well as in its parameters" in str(one.message) for one in told)


def attack_old_weight_norm():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.head)
        try:
            found = run(model)
        except TypeError as error:
            assert "cannot be copied" in str(error)
            return
    moved(found)


def attack_spectral_norm():
    model = Net().train()
    torch.nn.utils.parametrizations.spectral_norm(model.head)
    with untouched(model):
        found = run(model)
    moved(found)
    model.eval()
    close(run(model).outputs, found.outputs)


def attack_weights_in_buffers():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randn(K, 3))

        def forward(self, x):
            return x.mean((2, 3)) @ self.w.T

    refused(lambda: run(Buffered()), ValueError, mention="parameters")
    assert run(Buffered(), parameters="logits").outputs.isfinite().all()


def attack_complex_and_integer_buffers():
    model = Net()
    model.register_buffer("c", torch.ones(2, dtype=torch.complex64))
    model.register_buffer("i", torch.ones(2, dtype=torch.int32))
    model.register_buffer("f8", torch.ones(2).to(torch.float8_e4m3fn))
    model.register_buffer("none", None)
    as_plain(model)


def attack_complex_parameters_are_named():
    model = Net()
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with untouched(model):
        refused(lambda: run(model), ValueError, mention="phase")
        moved(run(model, parameters="head"))


def attack_lists_and_dicts_of_parameters():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            own = Net()
            self.ws = nn.ParameterList([own.head.weight, own.head.bias])
            self.named = nn.ParameterDict({"conv": own.features[0].weight, "bias": own.features[0].bias})
            self.bn = own.features[1]

        def forward(self, x):
            x = F.relu(self.bn(F.conv2d(x, self.named["conv"], self.named["bias"], padding=1)))
            return F.linear(x.mean((2, 3)), *self.ws)

    as_plain(Lists())


def attack_frozen_parts():
    model = Net()
    model.features.requires_grad_(False)
    as_plain(model)


def attack_dropout_in_train_mode():
    model = Net().train()
    model.features.append(nn.Dropout(0.5))
    as_plain(model)


OUTPUTS = {
    "tuple": lambda y: (y, y),
    "dict": lambda y: {"logits": y},
    "list": lambda y: [y],
    "none": lambda y: None,
    "integers": lambda y: y.argmax(1),
    "bool": lambda y: y > 0,
    "three_dims": lambda y: y[:, None],
    "one_dim": lambda y: y[:, 0],
    "fewer_classes": lambda y: y[:, :3],
    "complex": lambda y: y.to(torch.complex64),
    "sparse": lambda y: y.to_sparse(),
    "detached": lambda y: y.detach(),
    "numpy": lambda y: y.detach().numpy(),
    "one_row": lambda y: y[:1],
    "nan": lambda y: y * torch.nan,
    "no_columns": lambda y: y[:, :0],
}


class Returning(Net):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


def _bad_output(change):
    model = Returning(change)
    with untouched(model):
        for config in (CONFIG, ONLINE):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                session = Adapter(model, denoiser(), config)
                refused(lambda: session.adapt(images()), ValueError, TypeError, mention="model")
                assert session.state_dict() == {}


for _name, _change in OUTPUTS.items():
    globals()[f"attack_outputs_{_name}_are_refused"] = functools.partial(_bad_output, _change)


class Logits(torch.Tensor):
    pass


GOOD_OUTPUTS = {
    "half": (lambda y: y.half(), 2e-1),
    "bfloat16": (lambda y: y.bfloat16(), 2e-1),
    "double": (lambda y: y.double(), 1e-3),
    "in_place": (lambda y: y.mul_(2).div_(2), 1e-4),
    "strided": (lambda y: y.T.contiguous().T, 1e-4),
    "view": (lambda y: torch.cat([y, y], 1)[:, :K], 1e-4),
    "subclass": (lambda y: y.as_subclass(Logits), 1e-4),
}


def _good_output(change, tol):
    model = Returning(change)
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(model)
        moved(found)
        online = run(model, config=ONLINE)
    assert (found.outputs.double() - base().outputs.double()).abs().max() < tol
    assert (online.outputs.double() - run(config=ONLINE).outputs.double()).abs().max() < tol


for _name, (_change, _tol) in GOOD_OUTPUTS.items():
    globals()[f"attack_outputs_{_name}_are_taken"] = functools.partial(_good_output, _change, _tol)


def attack_one_class():
    found = run(Net(1), d=denoiser(classes=1), guard=2)
    assert found.outputs.isfinite().all() and (found.predictions == 0).all()


def attack_no_parameters():
    class Means(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) @ torch.ones(3, K).cumsum(1)

    refused(lambda: run(Means()), ValueError, mention="parameters")
    moved(run(Means(), parameters="logits", lr=0.5))


def attack_formats_of_models():
    for dtype, tol in ((torch.float64, 1e-3), (torch.bfloat16, 0.3), (torch.float16, 0.1)):
        model = Net().to(dtype)
        with untouched(model):
            found = run(model)
        assert found.outputs.isfinite().all()
        assert (found.outputs.double() - base().outputs.double()).abs().max() < tol, dtype


def attack_mixed_formats():
    class Mixed(Net):
        def __init__(self):
            super().__init__()
            self.head.double()

        def forward(self, x):
            return self.head(self.features(x).mean((2, 3)).double())

    as_plain(Mixed(), tol=1e-3)


def attack_lazy_modules_are_not_initialised():
    for kind, layer in (
        ("LazyLinear", nn.LazyLinear(K)),
        ("LazyBatchNorm", nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(K))),
    ):
        model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), layer)
        with untouched(model):
            text = refused(lambda m=model: run(m), ValueError, TypeError, RuntimeError)
        assert "nitialized" in text or "lazy" in text.lower() or "copied" in text, f"{kind}: {text}"


def attack_script_modules():
    """Scripted as a whole or in a part: adapted as the plain one, or refused by a TypeError or ValueError that says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, part = torch.jit.script(Net()), Net()
        part.features = torch.jit.script(part.features)
        wrong = []
        for name, model in (("whole", whole), ("part", part)):
            try:
                with untouched(model):
                    found = run(model)
                if not torch.allclose(found.outputs, base().outputs, rtol=1e-3, atol=1e-4):
                    wrong.append(f"{name}: other outputs, by {float((found.outputs - base().outputs).abs().max()):.2g}")
            except (TypeError, ValueError) as error:
                if "model" not in str(error) and "Script" not in str(error):
                    wrong.append(f"{name}: refused without its name: {error}")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
    assert not wrong, "; ".join(wrong)


def attack_a_compiled_part():
    model = Net()
    model.features = torch.compile(model.features, backend="eager")
    as_plain(model)


def attack_data_parallel_is_named():
    refused(lambda: run(nn.DataParallel(Net())), TypeError, mention="DataParallel")


def attack_attention_of_torch():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(4)
                self.embed = nn.Linear(12, 16)
                layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.5)
                self.encoder = nn.TransformerEncoder(layer, 2)
                self.head = nn.Linear(16, K)

        def forward(self, x):
            tokens = F.adaptive_avg_pool2d(x, 4).unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3).permute(0, 2, 1, 3, 4).flatten(2)
            return self.head(self.encoder(self.embed(tokens)).mean(1))

    model = Attending()
    with untouched(model):
        whole = run(model)
    moved(whole)
    alone = run(model, images()[2:], ids=torch.tensor([2]))
    close(alone.outputs, whole.outputs[2:], 1e-3)


def attack_a_part_without_gradient():
    class Part(Net):
        def forward(self, x):
            with torch.no_grad():
                x = self.features(x)
            return self.head(x.mean((2, 3)))

    with untouched():
        found = run(Part())
    close(found.outputs, run(parameters="head").outputs, 1e-4)


def attack_a_model_that_is_a_part_of_the_denoiser():
    d = denoiser()

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = d.network.x_embedder, nn.Linear(32, K)

        def forward(self, x):
            return self.head(self.patches(x).mean(1)) if self.patches(x).ndim == 3 else self.head(self.patches(x).flatten(2).mean(2))

    model = Shared()
    with untouched(model, d):
        moved(run(model, d=d, denoiser_parameters="all"))
        moved(run(model, d=d, mode="online", denoiser_parameters="all"))


class Everything(nn.Module):
    """Answers every attribute from what it wraps, as adapters of frameworks do."""

    def __init__(self, inner, gain=1.0):
        super().__init__()
        self.inner, self.gain = inner, gain

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x) * self.gain


def attack_a_wrapper_that_answers_for_its_inner():
    as_plain(Everything(Net()))


def attack_a_wrapper_of_a_compiled_model():
    """Its forward counts, not the _orig_mod that it hands through."""
    inner = torch.compile(Net(), backend="eager")
    found = run(Everything(inner, gain=3.0))
    close(found.outputs_before, 3 * base().outputs_before, 1e-4)


def attack_a_module_whose_copy_is_itself():
    class Once(Net):
        def __deepcopy__(self, memo):
            return self

    model = Once().train()
    model.features[1].train()
    with untouched(model), contextlib.suppress(TypeError, ValueError):
        close(run(model).outputs, base().outputs)


def attack_a_part_whose_copy_is_itself():
    class Shared(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    model = Net().train()
    model.features = Shared(*model.features).train()
    with untouched(model), contextlib.suppress(TypeError, ValueError):
        close(run(model).outputs, base().outputs)


def attack_a_denoiser_whose_part_s_copy_is_itself():
    class Shared(DiTNetwork):
        def __deepcopy__(self, memo):
            return self

    d = denoiser().train()
    d.network.__class__ = Shared
    with untouched(d), contextlib.suppress(TypeError, ValueError):
        close(run(d=d).outputs, base().outputs)


def attack_lora_in_a_module_whose_copy_is_itself():
    class Shared(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    model = Net().eval()
    model.tail = Shared(nn.Linear(K, K))
    model.forward = None
    del model.forward
    before = sorted(model.state_dict())

    class Tailed(Net):
        def forward(self, x):
            return self.tail(super().forward(x))

    model.__class__ = Tailed
    with contextlib.suppress(TypeError, ValueError):
        run(model, parameters="lora", lora_targets=("tail.0",))
    assert sorted(model.state_dict()) == before, f"the caller's model has new weights: {set(model.state_dict()) - set(before)}"


def attack_a_deepcopy_of_its_own_that_shares_weights():
    """Copies its modules, but keeps the very parameter objects."""

    class Sharing(Net):
        def __deepcopy__(self, memo):
            new = type(self)()
            new.head.weight = self.head.weight
            return new

    model = Sharing().train()
    with untouched(model), contextlib.suppress(TypeError, ValueError):
        run(model)
        run(model, config=ONLINE)


def attack_slots_and_properties():
    class Slotted(Net):
        __slots__ = ("extra",)

        def __init__(self):
            super().__init__()
            self.extra = [1]

        @property
        def device(self):
            return self.head.weight.device

        @property
        def training(self):
            return self.__dict__.get("_training", False)

        @training.setter
        def training(self, value):
            self.__dict__["_training"] = value

    as_plain(Slotted())


def attack_a_hook_that_keeps_what_it_sees():
    """The common feature extractor: a list outside of the module. What it holds after a call has to be usable."""
    model, seen = Net(), []
    model.features.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    with untouched(model):
        found = run(model)
    close(found.outputs, base().outputs)
    for value in seen:
        float(value.sum())  # a tensor of a vmap that has ended raises or is nonsense
        assert not torch._C._functorch.is_functorch_wrapped_tensor(value), "a dead tensor of a vmap was left with the caller"


def attack_a_global_hook():
    calls = [0]

    def count(module, args, output):
        calls[0] += 1

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        model = Net()
        with untouched(model):
            found = run(model)
    finally:
        handle.remove()
    close(found.outputs, base().outputs)


def attack_a_pre_hook_with_keywords():
    class Keyed(Net):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    model = Keyed()
    model.register_forward_pre_hook(lambda m, args, kwargs: (args, {"scale": 2.0}), with_kwargs=True)
    with untouched(model):
        found = run(model)
    close(found.outputs_before, 2 * base().outputs_before, 1e-4)
    moved(found)


def attack_a_full_backward_hook():
    model = Net()
    model.head.register_full_backward_hook(lambda m, gi, go: None)
    as_plain(model)


def attack_hooks_on_parameters():
    """A parameter's own hook is the caller's: the copy's gradients do not run it, and it stays."""
    model, calls = Net(), []
    model.head.weight.register_hook(lambda g: calls.append(1))
    model.head.weight.register_post_accumulate_grad_hook(lambda p: calls.append(2))
    as_plain(model)
    assert not calls


def attack_a_generator_and_a_lock_in_a_model():
    model = Net()
    model.generator = torch.Generator().manual_seed(1)
    state = model.generator.get_state().clone()
    try:
        run(model)
    except TypeError as error:
        assert "cannot be copied" in str(error)
    assert torch.equal(model.generator.get_state(), state)
    model.lock = threading.Lock()
    refused(lambda: run(model), TypeError, mention="cannot be copied")


def attack_weak_references_and_partials():
    model = Net()
    model.me = weakref.ref(model.head)
    model.call = functools.partial(nn.Module.__call__, model.head)
    as_plain(model)


def attack_a_model_that_trains_itself_is_told():
    class Learning(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    with untouched(model := Learning()):
        run(model)


def attack_weights_replaced_between_calls():
    model = Net()
    session = Adapter(model, denoiser(), CONFIG)
    session.adapt(images())
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    close(session.adapt(images()).outputs, run(model).outputs)
    model.head.weight.data = model.head.weight.data * 0.5
    close(session.adapt(images()).outputs, run(model).outputs)
    model.load_state_dict(Net().state_dict())
    close(session.adapt(images()).outputs, base().outputs)
    model.head = nn.Linear(8, K)
    close(session.adapt(images()).outputs, run(model).outputs)


def attack_a_weight_that_is_turned_between_calls():
    """`.data` with other strides in the same memory: weights are those at the call."""
    model = Net()
    model.mix = nn.Linear(8, 8, bias=False)

    class Mixing(Net):
        def forward(self, x):
            return self.head(self.mix(self.features(x).mean((2, 3))))

    model.__class__ = Mixing
    session = Adapter(model, denoiser(), CONFIG)
    session.adapt(images())
    model.mix.weight.data = model.mix.weight.data.t()
    close(session.adapt(images()).outputs_before, model.eval()(images()).detach())


def attack_a_head_cut_between_calls():
    """Classes cut off in the same memory, by .data: the session has to see it (here: refuse, for the denoiser has 7)."""
    model = Net()
    session = Adapter(model, denoiser(), CONFIG)
    session.adapt(images())
    model.head.weight.data, model.head.bias.data = model.head.weight.data[:5], model.head.bias.data[:5]
    refused(lambda: session.adapt(images()), ValueError, mention="5 classes")


def attack_buffers_replaced_between_calls():
    model = Net().eval()
    session = Adapter(model, denoiser(), CONFIG)
    session.adapt(images())
    model.features[1].running_mean = torch.full((8,), 0.3)
    close(session.adapt(images()).outputs_before, model(images()).detach())
    model.features[1].running_mean.fill_(-0.2)
    close(session.adapt(images()).outputs_before, model(images()).detach())


def attack_shared_storage_that_is_no_tie():
    model = Net()
    whole = torch.randn(K * 8 + K)
    model.head.weight, model.head.bias = nn.Parameter(whole[: K * 8].view(K, 8)), nn.Parameter(whole[K * 8 :])
    with untouched(model):
        moved(run(model))
        moved(run(model, config=ONLINE))


def attack_non_leaf_weights():
    model = Net()
    base_weight = nn.Parameter(model.head.weight.detach().clone())
    del model.head.weight
    model.head.weight = base_weight * 1
    refused(lambda: run(model), TypeError, mention="cannot be copied")


def attack_a_model_on_meta():
    refused(lambda: run(Net().to("meta")), ValueError, mention="meta")


def attack_quantised_dynamic_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})
        except Exception:
            return
        try:
            found = run(model)
            assert found.outputs.isfinite().all()
        except (TypeError, ValueError):
            pass


# ------------------------------------------------------------------------------------------- 4: numbers
def sound(**changes):
    x = changes.pop("x", None)
    model = changes.pop("model", None)
    for mode in ("episodic", "online"):
        if mode == "online" and changes.get("parameters") == "logits":
            continue
        session = Adapter(Net() if model is None else model, denoiser(), CONFIG.replace(**changes, mode=mode))
        for _ in range(2):
            found = session.adapt(images() if x is None else x)
            assert found.outputs.isfinite().all(), f"{mode}: outputs are not finite"
            assert found.outputs_before.isfinite().all()


NUMBERS = {
    "lr_0": {"lr": 0},
    "lr_tiny": {"lr": 1e-30},
    "lr_denormal": {"lr": 5e-324},
    "lr_huge": {"lr": 1e30},
    "lr_largest": {"lr": 1.7e308, "optimizer": "sgd"},
    "lr_huge_adamw": {"lr": 1e30, "optimizer": "adamw", "weight_decay": 1e30},
    "scale_huge": {"logit_scale": 1e300},
    "scale_tiny": {"logit_scale": 1e-300},
    "threshold_huge": {"guard": 2, "guard_threshold": 1e308},
    "half": {"precision": "fp16", "lr": 1e5},
    "denoiser_lr_huge": {"denoiser_parameters": "all", "denoiser_lr": 1e30, "guard": 2},
    "logits_lr_huge": {"parameters": "logits", "lr": 1e38},
    "one_pair_many_steps": {"pairs": 1, "steps": 5, "lr": 1e10, "guard": 1},
    "range_of_one": {"timestep_range": (999, 1000), "pairs": 3},
}
for _name, _changes in NUMBERS.items():
    globals()[f"attack_number_{_name}"] = functools.partial(sound, **_changes)


def attack_lr_0_changes_nothing():
    found = run(lr=0, optimizer="sgd")
    assert torch.equal(found.predictions, found.predictions_before)
    close(found.outputs, found.outputs_before)


def _config(field, value):
    refused(lambda: AdaptConfig(**{field: value}), ValueError, mention=field)


FIELDS = {
    "lr_of_400_digits": ("lr", 10**400),
    "weight_decay_of_400_digits": ("weight_decay", 10**400),
    "guard_threshold_of_400_digits": ("guard_threshold", 10**400),
    "momentum_of_400_digits": ("momentum", 10**400),
    "logit_scale_of_400_digits": ("logit_scale", 10**400),
    "lr_nan": ("lr", float("nan")),
    "lr_text": ("lr", "1e-3"),
    "lr_complex": ("lr", 1j),
    "steps_true": ("steps", True),
    "steps_tensor": ("steps", torch.tensor(2)),
    "steps_float": ("steps", 2.0),
    "mode_list": ("mode", ["online"]),
    "mode_array": ("mode", np.array(["online", "x"])),
    "seed_negative": ("seed", -1),
    "seed_2_63": ("seed", 2**63),
    "range_floats": ("timestep_range", (0.0, 5.0)),
    "range_set": ("timestep_range", {0, 5}),
    "range_reversed": ("timestep_range", (5, 0)),
    "targets_text": ("lora_targets", "q_proj"),
    "antithetic_text": ("antithetic", "yes"),
    "chunk_zero": ("chunk", 0),
    "chunk_text": ("chunk", "all"),
    "chunk_array": ("chunk", np.array([1, 2])),
    "timesteps_array": ("timesteps", np.array(["uniform", "x"])),
}
for _name, (_field, _value) in FIELDS.items():
    globals()[f"attack_config_{_name}"] = functools.partial(_config, _field, _value)


def attack_config_odd_pairs_of_opposites():
    refused(lambda: AdaptConfig(antithetic=True, pairs=3), ValueError, mention="antithetic")
    refused(
        lambda: adapt(
            Net(), denoiser(), images(), config=CONFIG.replace(antithetic=True), timesteps=torch.zeros(3, 2, 3, dtype=torch.int64)
        ),
        ValueError,
        mention="timesteps",
    )


def attack_flat_images():
    for value in (0.0, 1.0, 0.5):
        found = run(x=torch.full((2, 3, 16, 16), value), guard=2)
        assert found.outputs.isfinite().all()


def attack_images_of_one_pixel():
    found = run(x=images(2, size=1), guard=2)
    moved(found)
    assert found.outputs.isfinite().all()


def attack_images_of_odd_sizes():
    for size in ((1, 33), (5, 2), (17, 16)):
        assert run(x=torch.rand(2, 3, *size)).outputs.isfinite().all()


def attack_masked_and_huge_logits():
    class Masking(Net):
        def forward(self, x):
            mask = torch.tensor([0, 0, -torch.inf, 0, 0, 0, -torch.inf])
            return super().forward(x) + mask

    found = run(Masking(), guard=2)
    assert torch.isneginf(found.outputs[:, [2, 6]]).all() and found.outputs[:, [0, 1, 3]].isfinite().all()
    for factor in (1e30, 1e-30, 0.0):
        sound(model=Returning(lambda y, f=factor: y * f), guard=2)


def attack_all_but_one_class_masked():
    class One(Net):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0.0, *[-torch.inf] * 6])

    found = run(One(), guard=2, top_k=3, drawn_classes=2)
    assert (found.predictions == 0).all() and found.outputs[:, 0].isfinite().all()


def attack_all_classes_masked_is_refused():
    class None_(Net):
        def forward(self, x):
            return super().forward(x) - torch.inf

    model = None_()
    try:
        found = run(model, guard=2)
    except ValueError as error:
        assert "model" in str(error)
        return
    assert not found.accepted.any(), "an answer of no class was accepted"


def attack_extremes_in_latents_and_noise():
    x = images()
    noise = torch.randn(3, 2, 2, 3, 16, 16)
    for latents, drawn in ((torch.full_like(x, 1e38), None), (None, noise.clamp(-3, 3) * 1e38), (torch.full_like(x, -3e38), noise * 0)):
        found = adapt(Net(), denoiser(), x, config=CONFIG.replace(guard=2), latents=latents, noise=drawn)
        assert found.outputs.isfinite().all()
    for bad in (torch.nan, torch.inf):
        refused(lambda b=bad: adapt(Net(), denoiser(), x, config=CONFIG, latents=x * b), ValueError, mention="latents")
        refused(lambda b=bad: adapt(Net(), denoiser(), x, config=CONFIG, noise=noise * b), ValueError, mention="noise")
    found = adapt(Net(), denoiser(), x, config=CONFIG, latents=x.double() * 1e300)
    assert not found.accepted.any() and torch.equal(found.outputs, found.outputs_before)


def attack_latents_of_float64_beyond_float32():
    """Finite in their own format, infinite in the format that they are taken in."""
    x = images()
    found = adapt(Net(), denoiser(), x, config=CONFIG, noise=torch.full((3, 2, 2, 3, 16, 16), 1e300, dtype=torch.float64))
    assert found.outputs.isfinite().all()


def attack_nan_weights_in_a_denoiser():
    d = denoiser()
    with torch.no_grad():
        d.network.final_layer.linear.weight[0, 0] = torch.nan
    for config in (CONFIG.replace(guard=2), ONLINE, CONFIG.replace(denoiser_parameters="all"), CONFIG.replace(method="posterior")):
        session = Adapter(Net(), d, config)
        found = session.adapt(images())
        assert found.outputs.isfinite().all()
        close(found.outputs, found.outputs_before)
        assert session.state_dict() == {}


# ------------------------------------------------------------------------------------------- 5: online states
def online(**changes):
    session = Adapter(Net(), denoiser(), ONLINE.replace(**changes))
    session.adapt(images())
    return session


def attack_state_to_a_file_and_on():
    first = online()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    second = Adapter(Net(), denoiser(), ONLINE)
    second.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert torch.equal(first.adapt(images(2)).outputs, second.adapt(images(2)).outputs)


def attack_state_kept_while_calls_go_on():
    session = online()
    state = session.state_dict()
    kept = copy.deepcopy(state)
    session.adapt(images(2))
    session.reset()
    assert equal_states(state, kept)


def attack_state_dict_that_the_caller_writes_to():
    """What state_dict() gave is the caller's: emptying it, or writing to its tensors, changes no session."""
    session, twin = online(), online()
    state = session.state_dict()
    for p in state["theta"].values():
        p.zero_()
    state["step"].fill_(77)
    assert torch.equal(session.adapt(images(2)).outputs, twin.adapt(images(2)).outputs), "the session's own weights were written to"


def attack_loaded_state_that_the_caller_writes_to():
    session, twin = online(), online()
    state = copy.deepcopy(session.state_dict())
    session.load_state_dict(state)
    for p in state["theta"].values():
        p.mul_(0)
    assert torch.equal(session.adapt(images(2)).outputs, twin.adapt(images(2)).outputs), "the session's own weights were written to"


def _with_state(change, **changes):
    """A tampered state is refused by a ValueError, or works as it stands; the state that there was stays."""
    session, twin = online(**changes), online(**changes)
    state = copy.deepcopy(session.state_dict())
    state = change(state) or state
    before = copy.deepcopy(session.state_dict())
    try:
        session.load_state_dict(state)
    except ValueError:
        assert equal_states(session.state_dict(), before)
        assert torch.equal(session.adapt(images(2)).outputs, twin.adapt(images(2)).outputs)
        return
    except Exception as error:
        raise AssertionError(f"load_state_dict raises {type(error).__name__}: {str(error)[:120]} (ValueError is promised)") from error
    try:
        found = session.adapt(images(2)).outputs
    except Exception as error:
        raise AssertionError(f"was loaded, and then adapt() raises {type(error).__name__}: {str(error)[:120]}") from error
    assert torch.allclose(found, twin.adapt(images(2)).outputs, rtol=1e-3, atol=1e-3), "was loaded, and gives another result"


def tampered(change, **changes):
    in_child(lambda: _with_state(change, **changes))


def first(state):
    return next(iter(state["theta"]))


def _set(key, value):
    def change(state):
        state[key] = value(state[key]) if callable(value) else value

    return change


def _theta(value):
    def change(state):
        state["theta"] = {name: value(p) for name, p in state["theta"].items()}

    return change


def _slots(value):
    def change(state):
        state["theta_slots"] = [[value(p) for p in tensors] for tensors in state["theta_slots"]]

    return change


STATES = {
    "none": lambda s: ["nothing"],
    "a_list": lambda s: list(s.values()),
    "theta_sorted": _set("theta", lambda t: dict(sorted(t.items()))),
    "theta_reversed": _set("theta", lambda t: dict(reversed(list(t.items())))),
    "theta_double": _theta(lambda p: p.double()),
    "theta_half": _theta(lambda p: p.half()),
    "theta_integers": _theta(lambda p: p.round().long()),
    "theta_channels_last": _theta(lambda p: p.to(memory_format=torch.channels_last) if p.ndim == 4 else p),
    "theta_transposed": _theta(lambda p: p.T.contiguous().T if p.ndim == 2 else p),
    "theta_with_gradient": _theta(lambda p: p.clone().requires_grad_()),
    "theta_parameters": _theta(lambda p: nn.Parameter(p.clone())),
    "theta_meta": _theta(lambda p: p.to("meta")),
    "theta_numpy": _theta(lambda p: p.numpy()),
    "theta_complex": _theta(lambda p: p.to(torch.complex64)),
    "theta_sparse": _theta(lambda p: p.to_sparse()),
    "theta_a_list": _set("theta", lambda t: list(t.values())),
    "theta_none": _set("theta", None),
    "slots_transposed": _slots(lambda p: p.T.contiguous().T if p.ndim == 2 else p),
    "slots_channels_last": _slots(lambda p: p.to(memory_format=torch.channels_last) if p.ndim == 4 else p),
    "slots_none": _set("theta_slots", None),
    "slots_short": _set("theta_slots", lambda s: s[:1]),
    "step_negative": _set("step", lambda s: s - 10),
    "step_number": _set("step", 2),
    "step_float": _set("step", lambda s: s.float()),
    "step_vector": _set("step", lambda s: s.expand(3)),
    "step_2_40": _set("step", torch.tensor(2**40)),
    "step_bool": _set("step", torch.tensor(True)),
    "step_none": _set("step", None),
    "extra": _set("more", 1),
    "nan": _theta(lambda p: p * torch.nan),
    "step_huge_nan": _set("step", torch.tensor(torch.nan)),
}
for _name, _change in STATES.items():
    globals()[f"attack_state_{_name}"] = functools.partial(tampered, _change)


def attack_state_none_is_no_state():
    session = online()
    before = copy.deepcopy(session.state_dict())
    with contextlib.suppress(TypeError, ValueError):
        session.load_state_dict(None)
        raise AssertionError("None was taken for a state, and the session's own is gone")
    assert equal_states(session.state_dict(), before)


def attack_state_of_an_empty_dict_for_an_episodic_adapter():
    Adapter(Net(), denoiser(), CONFIG).load_state_dict({})


def attack_state_of_other_optimizers():
    for other in ("sgd", "adamw"):
        session = online()
        before = copy.deepcopy(session.state_dict())
        with contextlib.suppress(ValueError):
            session.load_state_dict(online(optimizer=other).state_dict())
            assert other == "adamw"  # the same memory
        assert other == "adamw" or equal_states(session.state_dict(), before)


def attack_state_after_the_model_changed_its_format():
    model = Net()
    session = Adapter(model, denoiser(), ONLINE)
    session.adapt(images())
    model.double()
    found = session.adapt(images())
    assert found.outputs.isfinite().all()


def attack_deepcopies_and_pickles():
    session = online()
    twins = [copy.deepcopy(session), pickle.loads(pickle.dumps(session))]
    expected = session.adapt(images(2)).outputs
    for twin in twins:
        close(twin.adapt(images(2)).outputs, expected)
        assert twin.engine.model is not session.engine.model


def attack_bad_input_leaves_the_state():
    session = online(guard=2)
    before = copy.deepcopy(session.state_dict())
    x = images()
    bad = [
        ((x * 9,), {}), ((x[:, :2],), {}), ((x,), {"image_ids": torch.tensor([1, 2])}), ((x,), {"image_ids": [1, 2, 3]}),
        ((x,), {"image_ids": torch.tensor([1.0, 2, 3])}), ((x,), {"image_ids": torch.tensor([-1, 2, 3])}),
        ((x,), {"latents": x[:1]}), ((x,), {"latents": x.long()}), ((x,), {"timesteps": torch.full((3, 2, 2), 1000)}),
        ((x,), {"timesteps": torch.full((3, 2, 2), -1)}), ((x,), {"timesteps": torch.zeros(3, 2, 0, dtype=torch.int64)}),
        ((x,), {"noise": torch.zeros(3, 2, 3, 3, 16, 16)}), ((x,), {"noise": torch.zeros(3, 2, 2, 3, 16, 16, dtype=torch.int32)}),
        ((x,), {"deadline_ms": 0}), ((x,), {"deadline_ms": float("nan")}), ((x,), {"deadline_ms": "5"}), ((x,), {"deadline_ms": True}),
        ((None,), {}), ((x,), {"image_ids": torch.tensor([True, False, True])}), ((x,), {"noise": "n"}), ((x,), {"timesteps": 3}),
    ]  # fmt: skip
    for args, kwargs in bad:
        name = next(iter(kwargs), "images")
        refused(lambda a=args, k=kwargs: session.adapt(*a, **k), ValueError, TypeError, mention=name)
    assert equal_states(session.state_dict(), before)


def _odd_argument(name, make):
    session = online()
    before = copy.deepcopy(session.state_dict())
    refused(lambda: session.adapt(images(), **{name: make()}), ValueError, TypeError, mention=name)
    assert equal_states(session.state_dict(), before)


ODD = {
    "ids_sparse": ("image_ids", lambda: torch.tensor([1, 2, 3]).to_sparse()),
    "ids_int32": ("image_ids", lambda: torch.tensor([1, 2, 3], dtype=torch.int32)),
    "ids_uint64": ("image_ids", lambda: torch.tensor([1, 2, 3]).to(torch.uint64)),
    "ids_meta": ("image_ids", lambda: torch.tensor([1, 2, 3]).to("meta")),
    "latents_sparse": ("latents", lambda: images().to_sparse()),
    "latents_float8": ("latents", lambda: images().to(torch.float8_e4m3fn)),
    "latents_quantised": ("latents", lambda: torch.quantize_per_tensor(images(), 0.01, 0, torch.quint8)),
    "noise_sparse": ("noise", lambda: torch.randn(3, 2, 2, 3, 16, 16).to_sparse()),
    "noise_float8": ("noise", lambda: torch.randn(3, 2, 2, 3, 16, 16).to(torch.float8_e4m3fn)),
    "timesteps_sparse": ("timesteps", lambda: torch.ones(3, 2, 2, dtype=torch.int64).to_sparse()),
    "deadline_of_400_digits": ("deadline_ms", lambda: 10**400),
    "deadline_complex": ("deadline_ms", lambda: 1j),
    "deadline_tensor": ("deadline_ms", lambda: torch.tensor([1.0, 2.0])),
}
for _name, (_field, _value) in ODD.items():
    globals()[f"attack_argument_{_name}"] = functools.partial(_odd_argument, _field, _value)


# ------------------------------------------------------------------------------------------- 6: threads
def threads(*works):
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(20)
    assert not any(thread.is_alive() for thread in started), "a thread hangs"
    return errors


def attack_threads_on_one_session_with_resets_and_warmups():
    session = Adapter(Net(), denoiser(), CONFIG)
    expected = [session.adapt(images(n)).outputs for n in (1, 2, 3)]
    wrong = []

    def adapts():
        for _ in range(3):
            for n in (1, 2, 3):
                if not torch.equal(session.adapt(images(n)).outputs, expected[n - 1]):
                    wrong.append(n)

    def resets():
        for _ in range(10):
            session.reset()
            session.state_dict()

    errors = threads(adapts, resets, lambda: session.warmup(images(2)), adapts)
    assert not errors, errors[:1]
    assert not wrong


def attack_an_exception_in_one_thread():
    session = Adapter(Net(), denoiser(), CONFIG)
    expected = session.adapt(images()).outputs
    wrong = []

    def bad():
        for _ in range(8):
            with contextlib.suppress(ValueError):
                session.adapt(images() + 3)

    def good():
        for _ in range(4):
            wrong.append(not torch.equal(session.adapt(images()).outputs, expected))

    assert not threads(bad, good, bad)
    assert not any(wrong)


def attack_loads_beside_calls():
    session = online()
    state = copy.deepcopy(session.state_dict())

    def loads():
        for _ in range(5):
            session.load_state_dict(state)

    def adapts():
        for _ in range(4):
            assert session.adapt(images()).outputs.isfinite().all()

    assert not threads(loads, adapts, session.reset)


def attack_a_warm_up_leaves_an_online_state():
    session = online()
    before = copy.deepcopy(session.state_dict())
    session.warmup(images(2))
    assert equal_states(session.state_dict(), before)
    refused(lambda: session.warmup(images() + 4))
    assert equal_states(session.state_dict(), before)
    assert session._warming is False


def attack_two_sessions_of_one_model_in_threads():
    model, d = Net().train(), denoiser()
    one, two = Adapter(model, d, CONFIG), Adapter(model, d, CONFIG.replace(denoiser_parameters="all"))
    expected = one.adapt(images()).outputs, two.adapt(images()).outputs
    wrong = []

    def work(session, wanted):
        for _ in range(4):
            wrong.append(not torch.equal(session.adapt(images()).outputs, wanted))

    with untouched(model, d):
        assert not threads(lambda: work(one, expected[0]), lambda: work(two, expected[1]))
    assert not any(wrong)


def attack_the_grad_mode_of_a_thread():
    session = Adapter(Net(), denoiser(), CONFIG)
    seen = []

    def work():
        torch.set_grad_enabled(False)
        session.adapt(images())
        seen.append(torch.is_grad_enabled())

    assert not threads(work, work)
    assert seen == [False, False]


# ------------------------------------------------------------------------------------------- 7: the ops
def draws(b=2, p=3, c=3, h=5, w=7, dtype=torch.float32, t=1000):
    g = torch.Generator().manual_seed(b * 1000 + p * 100 + h * 10 + w)
    return {
        "x0": torch.randn(b, c, h, w, generator=g).to(dtype), "table": process().table[:t].clone(),
        "timesteps": torch.randint(0, t, (b, p), generator=g), "image_ids": torch.randint(0, 2**32, (b,), generator=g), "seed": 99,
        "step": torch.tensor(2),
    }  # fmt: skip


def attack_op_shapes_of_all_sizes():
    """The native kernels against plain torch's, sizes 1 .. 70."""
    wrong = []
    for n in range(1, 71):
        given = draws(1 + n % 3, 1 + n % 5, 1 + n % 4, n, 1 + (n * 7) % 11, (torch.float32, torch.bfloat16, torch.float16)[n % 3])
        x_t = add_noise(Pairs(**given), torch.float32)
        expected = reference.add_noise(Pairs(**{**given, "x0": given["x0"].double()}), torch.float64)
        if not torch.allclose(x_t.double(), expected, rtol=1e-5, atol=1e-5):
            wrong.append(("noise", n))
        double = n % 2
        rows = torch.randn(len(x_t), x_t.shape[1] * (1 + double), *x_t.shape[2:])
        up = torch.rand(given["timesteps"].shape)
        found = denoising_loss_and_gradient(rows, up, Pairs(**given), bool(n % 4 == 1))
        wanted = reference.denoising_loss(rows, Pairs(**given), bool(n % 4 == 1), up)
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True)):
            wrong.append(("loss", n))
    assert not wrong, wrong[:5]


def attack_op_mixtures_of_all_sizes():
    wrong = []
    g = torch.Generator().manual_seed(0)
    for n in range(1, 71):
        b, k, e = 1 + n % 4, n, 1 + (n * 13) % 71
        per_image, top = bool(n % 2), None if n % 3 else 1 + (n * 5) % n if n > 1 else 1
        dtype = (torch.float32, torch.float16, torch.bfloat16)[n % 3]
        logits = torch.randn(b, k, generator=g).requires_grad_()
        table = torch.randn(*((b,) if per_image else ()), k, e, generator=g).to(dtype).requires_grad_()
        scale = None if n % 5 else 3.0
        found = mix_condition(logits, table, top, scale, per_image)
        z = logits if scale is None else scale * F.normalize(logits, dim=1)
        if top is not None:
            z = torch.full_like(z, -torch.inf).scatter(1, logits.topk(top, 1).indices, z.gather(1, logits.topk(top, 1).indices))
        expected = torch.einsum("bk,bke->be" if per_image else "bk,ke->be", z.softmax(1), table.float())
        tol = 1e-4 if dtype == torch.float32 else 3e-2
        up = torch.randn(b, e, generator=g)
        grads = torch.autograd.grad(found, [logits, table], up.to(dtype))
        wanted = torch.autograd.grad(expected, [logits, table], up)
        if not torch.allclose(found.float(), expected, rtol=tol, atol=tol):
            wrong.append(("value", n))
        if not all(torch.allclose(a.float(), w.float(), rtol=tol, atol=10 * tol) for a, w in zip(grads, wanted, strict=True)):
            wrong.append(("gradient", n))
    assert not wrong, wrong[:6]


def attack_op_layouts():
    given = draws()
    expected = add_noise(Pairs(**given))
    for name, layout in (
        ("channels_last", given["x0"].to(memory_format=torch.channels_last)),
        ("neg", torch._neg_view(-given["x0"])),
        ("imag", torch.complex(torch.zeros_like(given["x0"]), -given["x0"]).conj().imag),
        ("slice", torch.stack([given["x0"], given["x0"]], -1)[..., 0]),
        ("gradient", given["x0"].clone().requires_grad_()),
    ):
        assert torch.equal(add_noise(Pairs(**{**given, "x0": layout})), expected), name
    zero = torch._efficientzerotensor(2, 3, 5, 7)
    close(add_noise(Pairs(**{**given, "x0": zero})), add_noise(Pairs(**{**given, "x0": torch.zeros(2, 3, 5, 7)})))
    one = given["x0"][:1, :1, :1, :1].expand(2, 3, 5, 7)
    close(add_noise(Pairs(**{**given, "x0": one})), add_noise(Pairs(**{**given, "x0": one.contiguous()})))
    wide = {**given, "timesteps": given["timesteps"][:, :1].expand(2, 3), "image_ids": given["image_ids"][:1].expand(2)}
    close(add_noise(Pairs(**wide)), add_noise(Pairs(**{k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in wide.items()})))
    turned = {**given, "table": given["table"].T.contiguous().T}
    assert torch.equal(add_noise(Pairs(**turned)), expected)


def attack_op_neg_bits_in_predictions_and_tables():
    given = draws()
    rows = torch.randn(6, 3, 5, 7)
    close(denoising_loss(torch._neg_view(-rows), Pairs(**given)), denoising_loss(rows, Pairs(**given)))
    close(denoising_loss(torch._neg_view(-rows).requires_grad_(), Pairs(**given)).detach(), denoising_loss(rows, Pairs(**given)))
    close(denoising_loss(rows, Pairs(**{**given, "table": torch._neg_view(-given["table"])})), denoising_loss(rows, Pairs(**given)))
    logits, table = torch.randn(2, 5), torch.randn(5, 4)
    close(mix_condition(torch._neg_view(-logits), torch._neg_view(-table)), mix_condition(logits, table))
    a = torch._neg_view(-logits[:1]).requires_grad_()
    b = logits[:1].clone().requires_grad_()
    close(torch.autograd.grad(mix_condition(a, table).sum(), a)[0], torch.autograd.grad(mix_condition(b, table).sum(), b)[0])


def _op(**changes):
    name = next(iter(changes))

    def work():
        given = {**draws(), **changes}
        refused(lambda: add_noise(Pairs(**given)), ValueError, TypeError, mention=name)
        if name != "dtype":
            refused(lambda: denoising_loss(torch.randn(6, 3, 5, 7), Pairs(**given)), ValueError, TypeError, mention=name)

    in_child(work)


OPS = {
    "timesteps_negative": {"timesteps": torch.tensor([[-1, 2, 3], [4, 5, 6]])},
    "timesteps_beyond": {"timesteps": torch.tensor([[1000, 2, 3], [4, 5, 6]])},
    "timesteps_huge": {"timesteps": torch.full((2, 3), 2**62)},
    "timesteps_int32": {"timesteps": torch.ones(2, 3, dtype=torch.int32)},
    "timesteps_empty": {"timesteps": torch.ones(2, 0, dtype=torch.int64)},
    "timesteps_list": {"timesteps": [[1, 2, 3], [4, 5, 6]]},
    "ids_negative": {"image_ids": torch.tensor([-1, 0])},
    "ids_beyond": {"image_ids": torch.tensor([0, 2**32])},
    "step_negative": {"step": torch.tensor(-1)},
    "step_beyond": {"step": torch.tensor(2**32)},
    "step_float": {"step": torch.tensor(1.0)},
    "step_number": {"step": 1},
    "seed_beyond": {"seed": 2**63},
    "seed_negative": {"seed": -1},
    "seed_float": {"seed": 1.5},
    "pair0_negative": {"pair0": -1},
    "pair0_beyond": {"pair0": 2**32 - 3},
    "pair0_huge": {"pair0": 2**70},
    "x0_integers": {"x0": torch.ones(2, 3, 5, 7, dtype=torch.int64)},
    "x0_complex": {"x0": torch.ones(2, 3, 5, 7, dtype=torch.complex64)},
    "x0_empty": {"x0": torch.ones(2, 0, 5, 7)},
    "x0_sparse": {"x0": torch.ones(2, 3, 5, 7).to_sparse()},
    "x0_mkldnn": {"x0": torch.ones(2, 3, 5, 7).to_mkldnn()},
    "x0_quantised": {"x0": torch.quantize_per_tensor(torch.ones(2, 3, 5, 7), 0.1, 0, torch.quint8)},
    "table_double": {"table": process().table.double()},
    "table_empty": {"table": process().table[:0]},
    "table_narrow": {"table": process().table[:, :4]},
    "table_sparse": {"table": process().table.to_sparse()},
    "table_meta": {"table": process().table.to("meta")},
    "noise_integers": {"noise": torch.ones(2, 3, 3, 5, 7, dtype=torch.int64)},
    "noise_shape": {"noise": torch.ones(2, 3, 3, 5, 6)},
    "noise_meta": {"noise": torch.ones(2, 3, 3, 5, 7, device="meta")},
    "noise_sparse": {"noise": torch.ones(2, 3, 3, 5, 7).to_sparse()},
    "dtype_int": {"dtype": torch.int32},
}
for _name, _changes in OPS.items():
    globals()[f"attack_op_{_name}"] = functools.partial(_op, **_changes)


def attack_op_float8_is_taken_or_named():
    def work():
        try:
            found = add_noise(Pairs(**{**draws(), "x0": torch.ones(2, 3, 5, 7).to(torch.float8_e4m3fn)}), torch.float32)
            close(found, add_noise(Pairs(**{**draws(), "x0": torch.ones(2, 3, 5, 7)}), torch.float32), 1e-1)
        except ValueError as error:
            assert "x0" in str(error)

    in_child(work)


def attack_op_tables_that_are_not_finite():
    given = draws()
    for bad in (torch.nan, torch.inf):
        given["table"] = torch.full_like(given["table"], bad)
        assert not add_noise(Pairs(**given)).isfinite().any()
        assert not denoising_loss(torch.zeros(6, 3, 5, 7), Pairs(**given)).isfinite().any()


def attack_op_huge_strides():
    def work():
        given = draws()
        wide = torch.zeros(2, 3, 5, 7 * 100_000)[..., ::100_000]
        wide.copy_(given["x0"])
        assert torch.equal(add_noise(Pairs(**{**given, "x0": wide})), add_noise(Pairs(**given)))

    in_child(work)


def attack_op_images_too_large():
    refused(lambda: add_noise(Pairs(**{**draws(), "x0": torch.zeros(()).expand(2, 3, 65536, 65536)})), ValueError, mention="x0")


def attack_op_meta_tensors():
    given = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in draws().items()}
    assert add_noise(Pairs(**given)).shape == (6, 3, 5, 7)
    assert denoising_loss(torch.zeros(6, 3, 5, 7, device="meta"), Pairs(**given)).shape == (2, 3)
    assert mix_condition(torch.zeros(2, 5, device="meta"), torch.zeros(5, 3, device="meta")).shape == (2, 3)


def attack_op_double_backward_is_refused():
    rows = torch.randn(6, 3, 5, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(denoising_loss(rows, Pairs(**draws())).sum(), rows, create_graph=True)
    refused(lambda: torch.autograd.grad(gradient.square().sum(), rows), RuntimeError)
    logits, table = torch.randn(2, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(mix_condition(logits, table).square().sum(), logits, create_graph=True)
    refused(lambda: torch.autograd.grad(gradient.square().sum(), logits), RuntimeError)


def attack_op_inputs_changed_before_the_backward():
    given = draws()
    rows = torch.randn(6, 3, 5, 7, requires_grad=True)
    loss = denoising_loss(rows, Pairs(**given)).sum()
    given["table"].mul_(2)
    refused(lambda: torch.autograd.grad(loss, rows), RuntimeError)
    logits, table = torch.randn(2, 5, requires_grad=True), torch.randn(5, 3)
    mixed = mix_condition(logits, table).sum()
    table.zero_()
    refused(lambda: torch.autograd.grad(mixed, logits), RuntimeError)


def attack_op_leaves_its_arguments():
    given = {**draws(), "noise": torch.randn(2, 3, 3, 5, 7)}
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    rows, up = torch.randn(6, 6, 5, 7), torch.rand(2, 3)
    copies = rows.clone(), up.clone()
    add_noise(Pairs(**given))
    denoising_loss_and_gradient(rows, up, Pairs(**given))
    assert all(torch.equal(v, kept[k]) for k, v in given.items() if isinstance(v, torch.Tensor))
    assert torch.equal(rows, copies[0]) and torch.equal(up, copies[1])


def attack_op_results_are_fresh_memory():
    """custom ops may not return their inputs: a result of its own, also where nothing has to be computed."""
    given = {
        **draws(1, 1),
        "noise": torch.zeros(1, 1, 3, 5, 7),
        "table": torch.tensor([[1.0, 0, 0, 1, 1]]),
        "timesteps": torch.zeros(1, 1, dtype=torch.int64),
    }
    found = add_noise(Pairs(**given))
    assert torch.equal(found, given["x0"]) and found.data_ptr() != given["x0"].data_ptr()
    table = torch.randn(1, 4)
    mixed = mix_condition(torch.zeros(1, 1), table)
    assert mixed.data_ptr() != table.data_ptr()


def _mixture(*args, name="", **kwargs):
    in_child(lambda: refused(lambda: mix_condition(*args, **kwargs), ValueError, TypeError, RuntimeError, mention=name))


MIXTURES = {
    "no_classes": ((torch.zeros(2, 0), torch.zeros(0, 3)), {"name": "logits"}),
    "no_images": ((torch.zeros(0, 3), torch.zeros(3, 3)), {"name": "logits"}),
    "other_classes": ((torch.zeros(2, 5), torch.zeros(4, 3)), {"name": "embeddings"}),
    "empty_embedding": ((torch.zeros(2, 5), torch.zeros(5, 0)), {"name": "embeddings"}),
    "integers": ((torch.zeros(2, 5).long(), torch.zeros(5, 3)), {"name": "logits"}),
    "top_0": ((torch.zeros(2, 5), torch.zeros(5, 3), 0), {"name": "top_k"}),
    "top_6": ((torch.zeros(2, 5), torch.zeros(5, 3), 6), {"name": "top_k"}),
    "scale_nan": ((torch.zeros(2, 5), torch.zeros(5, 3), None, float("nan")), {"name": "logit_scale"}),
    "scale_inf": ((torch.zeros(2, 5), torch.zeros(5, 3), None, float("inf")), {"name": "logit_scale"}),
    "one_table_for_two": ((torch.zeros(2, 5), torch.zeros(1, 5, 3), None, None, True), {"name": "embeddings"}),
    "sparse": ((torch.zeros(2, 5), torch.ones(5, 3).to_sparse()), {"name": "embeddings"}),
    "meta": ((torch.zeros(2, 5), torch.ones(5, 3, device="meta")), {"name": "embeddings"}),
}
for _name, (_args, _kwargs) in MIXTURES.items():
    globals()[f"attack_mixture_{_name}"] = functools.partial(_mixture, *_args, **_kwargs)


def attack_mixture_of_nan_and_infinite_logits():
    table = torch.randn(5, 3)
    for row in ([torch.nan] * 5, [torch.inf, 0, 0, 0, 0], [-torch.inf] * 5, [-torch.inf, 0, 0, 0, 1], [3e38, -3e38, 0, 0, 0]):
        for count in (1, 3):
            for top in (None, 2, 5):
                logits = torch.tensor([row] * count)
                found = mix_condition(logits, table, top)
                chosen = logits.topk(top or 5, 1).indices
                expected = torch.einsum("bk,bke->be", logits.gather(1, chosen).softmax(1), table[chosen])
                torch.testing.assert_close(found, expected, equal_nan=True, msg=f"{row} {count} {top}: {found} {expected}")


def attack_mixture_backward_with_classes_beyond():
    """The backward op called by its name with classes that are none: refused, or an error; no memory outside is read."""
    op = torch.ops.dtta_fast.mix_condition_backward

    def work():
        logits, table = torch.randn(2, 5), torch.randn(5, 3)
        for chosen in (torch.full((2, 2), 10**9), torch.full((2, 2), -1), torch.full((2, 9), 2)):
            for dtype in (torch.float32, torch.float64):
                weights = torch.full((2, 5), 0.2, dtype=dtype)
                args = (torch.ones(2, 3, dtype=dtype), logits.to(dtype), table.to(dtype), weights, chosen, None, False, True)
                with contextlib.suppress(ValueError, RuntimeError, IndexError):
                    found = op(*args)
                    assert found[0].isfinite().all()
        with contextlib.suppress(ValueError, RuntimeError, IndexError):
            op(torch.ones(2, 3), logits, table, torch.ones(2, 5), torch.zeros(2, 0, dtype=torch.int64), float("nan"), False, True)

    in_child(work)


def attack_loss_with_other_predictions():
    given = draws()
    for rows in (
        torch.zeros(6, 4, 5, 7),
        torch.zeros(5, 3, 5, 7),
        torch.zeros(6, 3, 5, 7).long(),
        torch.zeros(6, 3, 7, 5),
        torch.zeros(0, 3, 5, 7),
    ):
        in_child(lambda r=rows: refused(lambda: denoising_loss(r, Pairs(**given)), ValueError, mention="prediction"))
    for up in (torch.zeros(3, 2), torch.zeros(2, 3).long(), torch.zeros(2, 3, device="meta")):
        in_child(
            lambda u=up: refused(
                lambda: denoising_loss_and_gradient(torch.zeros(6, 3, 5, 7), u, Pairs(**given)), ValueError, mention="upstream"
            )
        )


def attack_native_called_with_other_memory():
    """kernels.native itself: C++ walks memory by the type alone, so any other tensor is refused."""

    def work():
        if native.library() is None:
            return
        given = draws()
        x0, table, t, ids, seed, step = (given[k] for k in ("x0", "table", "timesteps", "image_ids", "seed", "step"))
        for args in (
            (x0.double(), table, t, ids), (x0, table.double(), t, ids), (x0, table, t.int(), ids), (x0, table, t, ids.int()),
            (x0.transpose(2, 3), table, t, ids), (x0.to("meta"), table, t, ids),
        ):  # fmt: skip
            refused(lambda a=args: native.add_noise(*a, seed, step, 0, torch.float32, None), TypeError, ValueError)

    in_child(work)


def attack_native_called_with_too_few_rows():
    """kernels.native with shapes that do not go together is private; the public ops check them. Only that no public way leads there."""
    given = draws()
    refused(lambda: add_noise(Pairs(**{**given, "image_ids": given["image_ids"][:1]})), ValueError, mention="image_ids")
    refused(lambda: add_noise(Pairs(**{**given, "timesteps": given["timesteps"][:1]})), ValueError, mention="timesteps")


def attack_op_in_a_child_and_many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    try:
        given = draws(4, 5, 3, 33, 31)
        many = add_noise(Pairs(**given))
        torch.set_num_threads(1)
        assert torch.equal(add_noise(Pairs(**given)), many)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- 8: the arguments of a session
def attack_arguments_of_a_session():
    d = denoiser()
    refused(lambda: Adapter(Net, d), TypeError, mention="model")
    refused(lambda: Adapter(lambda x: x, d), TypeError, mention="model")
    refused(lambda: Adapter(Net(), Net()), TypeError, mention="denoiser")
    refused(lambda: Adapter(Net(), torch.compile(d)), TypeError, mention="denoiser")
    refused(lambda: Adapter(Net(), d, {"steps": 1}), TypeError, mention="config")
    refused(lambda: Adapter(Net(), d, CONFIG, Classification), TypeError, mention="task")
    refused(lambda: Adapter(Net(), d, CONFIG.replace(match="both")), ValueError, mention="match")
    refused(lambda: Adapter(Net(), d, CONFIG.replace(timestep_range=(0, 1001))), ValueError, mention="timestep_range")
    refused(lambda: run(top_k=8), ValueError, mention="top_k")
    refused(lambda: run(memory_budget=1), ValueError, mention="memory_budget")
    refused(lambda: CONFIG.replace(stepz=1), ValueError, mention="stepz")


def attack_an_empty_subset_and_others():
    for subset in ([], [1, 1], [-1], [99]):
        refused(lambda s=subset: run(task=Classification(subset=s)), ValueError, mention="subset")
    refused(lambda: Classification(subset=[0.5, 1.5]), ValueError, TypeError, mention="subset")
    refused(lambda: Classification(subset=["a"]), ValueError, TypeError, mention="subset")


def attack_saving_lora_where_there_is_none():
    refused(lambda: online().save_lora("/tmp/none"), ValueError, mention="parameters")


def attack_digits_in_company():
    model, d = dtta_fast.zoo.load("digits")
    x, _ = dtta_fast.zoo.example("digits")
    x = (x[:4] * 0.3 + 0.3).float() if x.is_floating_point() else x[:4]
    with untouched(model, d):
        whole = adapt(model, d, x)
        alone = adapt(model, d, x[2:3], image_ids=torch.tensor([2]))
    close(alone.outputs_before, whole.outputs_before[2:3], 1e-4)
    assert torch.equal(alone.predictions, whole.predictions[2:3])


def attack_digits_flat_and_tiny_images():
    model, d = dtta_fast.zoo.load("digits")
    for x in (torch.zeros(2, 3, 32, 32), torch.ones(1, 3, 1, 1), torch.rand(2, 3, 2, 50)):
        found = adapt(model, d, x)
        assert found.outputs.isfinite().all()


# ------------------------------------------------------------------------------------------- against a plain loop
def naive(model, x=None, parameters=None, steps=2, pairs=2, lr=1e-2):
    """The method as a plain loop of torch: the copied module's own parameters, autograd, torch.optim.Adam."""
    from dtta_fast.core.draws import Draws

    d, x, answers = denoiser().eval(), images() if x is None else x, []
    for i in range(len(x)):
        own, ids = copy.deepcopy(model).eval().requires_grad_(True), torch.tensor([i])
        optimizer = torch.optim.Adam(own.parameters() if parameters is None else parameters(own), lr=lr)
        x0 = d.encode(x[i : i + 1])
        for step in range(steps):
            step = torch.tensor(step)
            t = Draws(0, pairs, "stratified", 0, 1000).timesteps(ids, step)
            given = {"x0": x0, "table": d.process.table, "timesteps": t, "image_ids": ids, "seed": 0, "step": step}
            condition = own(x[i : i + 1]).softmax(1) @ d.class_embeddings({})
            loss = denoising_loss(d(add_noise(Pairs(**given)), t.flatten(), condition), Pairs(**given)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        answers.append(own(x[i : i + 1]).detach())
    return torch.cat(answers)


def like_naive(model, tol=2e-3, **changes):
    """Episodic, of several images and of one."""
    expected = naive(model)
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (3, 1):
            found = run(model, images()[:n], **changes)
            moved(found)
            close(found.outputs.float(), expected[:n].float(), tol)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make()


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(48, 8, batch_first=True), nn.Linear(8, K)

    def forward(self, x):
        return self.head(self.cell(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


class ByList(Net):
    """Reads its weights from a list beside the registered ones."""

    def __init__(self):
        super().__init__()
        self.weights = [self.head.weight, self.head.bias]

    def forward(self, x):
        return F.linear(self.features(x).mean((2, 3)), *self.weights)


class Energy(Net):
    """Its logits are built from a gradient of its own."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = super().forward(x)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y + g.mean((1, 2, 3))[:, None]


class Functional(Net):
    """torch.func in its forward."""

    def forward(self, x):
        y = self.features(x).mean((2, 3))
        return torch.vmap(lambda row: F.linear(row, self.head.weight, self.head.bias))(y)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class WithFunction(Net):
    def forward(self, x):
        return Doubling.apply(super().forward(x))


class Odd(Net):
    """Parameters of no element and of no dimension, one that never takes part, a buffer with a gradient."""

    def __init__(self):
        super().__init__()
        self.empty, self.gain, self.unused = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(4))
        self.register_buffer("learning", torch.ones(1, requires_grad=True))
        self.register_buffer("wide", torch.ones(1).expand(5))

    def forward(self, x):
        return super().forward(x) * self.gain * self.learning + self.empty.sum() + self.wide.mean()


class Data(Net):
    """Reads .data, .item() and shapes."""

    def forward(self, x):
        y = super().forward(x)
        return y * (1.5 if self.head.weight.data.abs().max().item() > 0 else 0.5)


def normed(model, how):
    how(model.head)
    return model


NAIVE = {
    "plain": Net,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "energy": Energy,
    "functional": Functional,
    "custom_function": WithFunction,
    "odd_parameters": Odd,
    "item": Data,
    "weight_norm": lambda: normed(Net(), torch.nn.utils.parametrizations.weight_norm),
    "spectral_norm": lambda: normed(Net().eval(), torch.nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: normed(Net(), torch.nn.utils.parametrizations.orthogonal),
    "channels_last": lambda: Net().to(memory_format=torch.channels_last),
    "conv_transpose": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, 2), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, K)
    ),
    "group_and_instance_norm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten(), nn.LazyLinear(K)
    ),
    "bilinear": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(12, 6), nn.Softplus(), nn.Linear(6, K)),
    "embedding_of_pixels": lambda: Pixels(),
    "old_weight_norm_without_gradient": lambda: old_norm(),
}


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(16, 8, mode="mean"), nn.Linear(8, K)

    def forward(self, x):
        return self.head(self.table((x * 15).long().flatten(1)))


def old_norm():
    model = Net()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.head)
        model(images())
    model.head.weight = model.head.weight.detach()
    return model


def _like_naive(make):
    model = seeded(make)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        with torch.random.fork_rng():
            model(images())
    like_naive(model)


for _name, _make in NAIVE.items():
    globals()[f"attack_plain_loop_{_name}"] = functools.partial(_like_naive, _make)


def attack_plain_loop_online_lstm():
    """One set of weights for the batch: the recurrent weights move as the others do."""
    model = seeded(lambda: Recurrent(nn.LSTM))
    session = Adapter(model, denoiser(), ONLINE)
    session.adapt(images())
    still = [name for name, p in session.state_dict()["theta"].items() if torch.equal(p, model.get_parameter(name))]
    assert not still, f"did not move: {still}"


def attack_state_reordered_under_sgd():
    tampered(lambda s: s.update(theta=dict(reversed(list(s["theta"].items())))), optimizer="sgd")


def attack_state_reordered_weights_of_equal_shapes():
    """Two weights of one shape in the other order: taken by name, or refused; never with one another's moments."""

    def work():
        model = seeded(
            lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48), nn.Linear(48, K))
        )
        session = Adapter(model, denoiser(), ONLINE)
        session.adapt(images())
        state = copy.deepcopy(session.state_dict())
        names = list(state["theta"])
        names[0], names[2] = names[2], names[0]
        names[1], names[3] = names[3], names[1]
        state["theta"] = {name: state["theta"][name] for name in names}
        other = Adapter(model, denoiser(), ONLINE)
        try:
            other.load_state_dict(state)
        except ValueError:
            return
        close(other.adapt(images(2)).outputs, session.adapt(images(2)).outputs)

    in_child(work)


def attack_state_from_safetensors():
    """theta as safetensors gives it back: by sorted names, with the same numbers."""
    from safetensors.torch import load, save

    tampered(lambda s: s.update(theta=load(save({k: v.contiguous() for k, v in s["theta"].items()}))))


def attack_a_run_s_state_with_weights_in_another_order():
    """A file of a run, from anybody, whose checksum anybody can make: read_state() takes it, and a load has to be safe."""
    import pathlib
    import tempfile

    from dtta_fast.runs.state import read_state, state_bytes

    def work():
        session = online()
        state = copy.deepcopy(session.state_dict())
        state["theta"] = dict(reversed(list(state["theta"].items())))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "state"
            path.write_bytes(state_bytes(state, 1, {}))
            read = read_state(path, 1, {}, "cpu")
        with contextlib.suppress(ValueError):
            session.load_state_dict(read)
        session.adapt(images())

    in_child(work)


def attack_a_result_is_pickled_and_copied():
    found = base()
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert torch.equal(other.outputs, found.outputs) and other.seconds.keys() == found.seconds.keys()


def attack_copies_of_a_session_at_work():
    session = Adapter(Net(), denoiser(), CONFIG)
    expected = session.adapt(images()).outputs
    wrong, done = [], threading.Event()

    def adapts():
        for _ in range(12):
            session.adapt(images())
        done.set()

    def copies():
        for _ in range(300):
            if done.is_set():
                return
            twin = copy.deepcopy(session)
            wrong.append(not torch.allclose(twin.adapt(images()).outputs, expected, rtol=1e-4, atol=1e-5))

    errors = threads(adapts, copies)
    assert not errors, f"{type(errors[0]).__name__}: {str(errors[0])[:150]}"
    assert not any(wrong)


def attack_configs_of_timm_that_are_odd():
    for own in ({}, {"mean": None}, {"mean": (0.5, 0.5, 0.5)}):
        model = Net()
        model.pretrained_cfg = own
        with contextlib.suppress(ValueError, TypeError):
            assert run(model).outputs.isfinite().all()
    model = Net()
    model.pretrained_cfg = None
    with contextlib.suppress(ValueError, TypeError):
        close(run(model).outputs, base().outputs)


def attack_a_part_under_inference_mode_is_taken_or_named():
    class Part(Net):
        def forward(self, x):
            with torch.inference_mode():
                x = self.features(x)
            return self.head(x.mean((2, 3)))

    with contextlib.suppress(ValueError):
        assert run(Part()).outputs.isfinite().all()


def attack_the_caller_s_own_optimizer_goes_on():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    session = Adapter(model, denoiser(), CONFIG.replace(precision="bf16"))
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).sum().backward()
        optimizer.step()
        close(session.adapt(images()).outputs_before, model.eval()(images()).detach())
        model.train()


def attack_a_training_graph_of_the_caller_survives():
    model = Net()
    loss = model(images()).sum()
    run(model)
    loss.backward()
    assert model.head.weight.grad is not None


def attack_a_bound_method_kept_outside():
    """The caller's references to its own modules stay its own."""
    model = Net()
    forward, head = model.forward, model.head
    run(model)
    assert forward.__self__ is model and model.head is head


class Albert(nn.Module):
    """One layer, used three times and registered three times."""

    def __init__(self):
        super().__init__()
        self.stem, layer = nn.Linear(48, 16), nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.layers, self.head = nn.ModuleList([layer] * 3), nn.Linear(16, K)

    def forward(self, x):
        x = self.stem(F.adaptive_avg_pool2d(x, 4).flatten(1))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def attack_one_module_under_two_names():
    like_naive(seeded(Albert))


def attack_one_module_under_two_names_from_call_to_call():
    """The second call's answer from before is the source's, not that of the first call's adapted weights."""
    session = Adapter(seeded(Albert), denoiser(), CONFIG)
    first, second = (session.adapt(images()[:1]) for _ in range(2))
    close(first.outputs_before, seeded(Albert)(images()[:1]).detach())
    close(second.outputs_before, first.outputs_before)


def attack_one_module_under_two_names_whose_answer_stands():
    """No step fits into the deadline: the answer is the source's, whatever was adapted to before."""
    session = Adapter(seeded(Albert), denoiser(), CONFIG.replace(mode="online"))
    first = session.adapt(images())
    session.reset()
    found = session.adapt(images())
    close(found.outputs_before, first.outputs_before)


def attack_one_module_under_two_names_by_methods_that_train_nothing():
    session = Adapter(seeded(Albert), denoiser(), CONFIG.replace(method="posterior"))
    first = session.adapt(images())
    assert torch.equal(session.adapt(images()).outputs, first.outputs)


def attack_buffers_of_a_module_under_two_names():
    model = Net().eval()
    model.again = model.features
    session = Adapter(model, denoiser(), CONFIG.replace(parameters="logits"))
    session.adapt(images())
    with torch.no_grad():
        model.features[1].running_mean.fill_(0.4)
    close(session.adapt(images()).outputs_before, model(images()).detach())


def attack_a_denoiser_with_a_module_under_two_names():
    d = denoiser()
    d.network.again = d.network.final_layer
    config = CONFIG.replace(denoiser_parameters="all", denoiser_lr=1e-2, guard=4)
    expected = Adapter(Net(), denoiser(), config)
    session = Adapter(Net(), d, config)
    for _ in range(2):
        found, wanted = session.adapt(images()), expected.adapt(images())
        close(found.loss, wanted.loss, 1e-4)
        close(found.outputs, wanted.outputs, 1e-4)
        assert all(map(torch.equal, session.engine.program.problem.denoiser.parameters(), d.parameters())), (
            "the guard's denoiser has adapted weights"
        )


def attack_a_parameter_under_two_names_of_one_module():
    model = Net()
    model.head.again = model.head.weight
    session = Adapter(model, denoiser(), CONFIG)
    for _ in range(2):
        found = session.adapt(images())
        close(found.outputs, base().outputs)
        close(found.outputs_before, base().outputs_before)


def attack_from_call_to_call_of_unusual_models():
    """Every model of the plain loop twice in one session: the second call's results are the first one's."""
    wrong = []
    for name, make in NAIVE.items():
        model = seeded(make)
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            with torch.random.fork_rng():
                model(images())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in (1, 3):
                session = Adapter(model, denoiser(), CONFIG)
                first, second = (session.adapt(images()[:n]) for _ in range(2))
                if not torch.equal(first.outputs, second.outputs) or not torch.equal(first.outputs_before, second.outputs_before):
                    wrong.append((name, n))
    assert not wrong, wrong


def attack_a_real_alarm_that_raises():
    """signal.setitimer with a handler that raises TimeoutError, as services bound a call: the session goes on after it."""
    session, twin = Adapter(Net(), denoiser(), CONFIG), Adapter(Net(), denoiser(), CONFIG)
    expected = twin.adapt(images())
    session.adapt(images())

    def handler(*_):
        raise TimeoutError("deadline")

    before, wrong = signal.signal(signal.SIGALRM, handler), 0
    start = time.perf_counter()
    twin.adapt(images())
    whole = time.perf_counter() - start
    draw = random.Random(0)
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.05, 1) * whole)
                session.adapt(images())
            except TimeoutError:
                pass
            except Exception:
                wrong += 1
                session = Adapter(Net(), denoiser(), CONFIG)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        found = session.adapt(images())
    finally:
        signal.signal(signal.SIGALRM, before)
    close(found.outputs_before, expected.outputs_before)
    close(found.outputs, expected.outputs)
    assert not wrong, f"{wrong} later calls failed"


def attack_a_module_that_holds_itself():
    model = Net()
    object.__setattr__(model, "root", model)
    model.features.__dict__["parent"] = model
    as_plain(model)


def attack_a_model_in_a_cycle_with_a_session():
    model = Net()
    session = Adapter(model, denoiser(), CONFIG)
    model.__dict__["session"] = session
    close(session.adapt(images()).outputs, base().outputs)
    session.reset()
    close(session.adapt(images()).outputs, base().outputs)


def attack_modules_changed_while_a_session_waits():
    """A hook that the caller puts on later is not the session's (it says so); weights stay the caller's."""
    model = Net()
    session = Adapter(model, denoiser(), CONFIG)
    session.adapt(images())
    model.register_forward_hook(lambda m, a, o: o * 0)
    model.train()
    with untouched(model):
        close(session.adapt(images()).outputs, base().outputs)


def attack_images_s_memory_is_not_kept():
    x = images()
    session = Adapter(Net(), denoiser(), CONFIG)
    found = session.adapt(x)
    kept = found.outputs.clone(), found.outputs_before.clone()
    x.zero_()
    assert torch.equal(found.outputs, kept[0]) and torch.equal(found.outputs_before, kept[1])
    close(session.adapt(images()).outputs, base().outputs)


def attack_ids_that_repeat():
    x = images(1).expand(3, -1, -1, -1)
    found = run(x=x, ids=torch.tensor([9, 9, 9]))
    close(found.outputs[:1].expand(3, -1), found.outputs, 1e-5)


def main(words):
    cases = [(name, case) for name, case in globals().items() if name.startswith("attack_") and all(w in name for w in words)]
    held, fell, slow = 0, [], []
    base()
    for name, case in cases:
        start = time.perf_counter()
        torch.set_grad_enabled(True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case()
            held += 1
            print(f"held  {name}", flush=True)
        except BaseException as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:420]
            fell.append(name)
            print(f"FELL  {name}: {reason}", flush=True)
        if time.perf_counter() - start > 2:
            slow.append(f"{name} {time.perf_counter() - start:.1f}s")
    print(f"{len(cases)} cases: {held} held, {len(fell)} FELL; slow: {', '.join(slow)}")


if __name__ == "__main__":
    main(sys.argv[1:])
