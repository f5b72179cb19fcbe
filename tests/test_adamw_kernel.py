"""The kernel that updates pages gives what torch's loop gives: bit for bit on CUDA, and in Triton's interpreter but for a fused product."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from torch import nn

from reference.kernels import adamw
from reference.paging import OffloadedAdamW, PagedAdamW

SHAPES = ((37, 150), (200,), (), (3, 5, 7), (70, 64), (1,), (0,))


class Interpreted(PagedAdamW):
    """On a CPU the kernel too, which otherwise only a GPU gets."""

    def _updater(self, gradients, numbers):
        if self._tables is None:
            self._tables = adamw.Tables.of(self.layout.pages, self.pool.device)
        return adamw.PageUpdates(self._tables, self.layout.pages, self._parameters, gradients, numbers)


def parameters(dtype, device="cpu", shapes=SHAPES):
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=g).to(device, dtype)) for shape in shapes]


def gradients(step, *models, missing=()):
    g = torch.Generator().manual_seed(step)
    for number, together in enumerate(zip(*models, strict=True)):
        scale = 10 ** (4 * torch.rand((), generator=g) - 3)
        grad = (torch.randn(together[0].shape, generator=g) * scale).to(together[0].device, together[0].dtype)
        for p in together:
            p.grad = None if number in missing else grad.clone()


def settings(beta, dtype=torch.float32):
    eps = 1e-4 if dtype is torch.float16 else 1e-8  # 1e-8 is zero in float16
    return dict(lr=1e-2, betas=(beta, 0.95), eps=eps, weight_decay=0.3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 0/0 in places that are not stored
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("beta", [0.9, 0.3])
def test_interpreted_it_is_close(dtype, beta):
    one, other = parameters(dtype), parameters(dtype)
    ours = Interpreted(one, resident_bytes=1 << 15, page_bytes=1 << 14, **settings(beta, dtype))
    theirs = torch.optim.AdamW(other, foreach=False, fused=False, **settings(beta, dtype))
    for step in range(4):
        gradients(step, one, other, missing=(1,) if step == 2 else ())
        ours.step()
        theirs.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_gradients_at_odd_addresses():
    one, other = parameters(torch.float32), parameters(torch.float32)
    ours, theirs = Interpreted(one, page_bytes=1 << 14), torch.optim.AdamW(other)
    gradients(0, one, other)
    for p in one:
        odd = torch.zeros(p.numel() + 1)[1:].view(p.shape)
        p.grad = odd.copy_(p.grad)
    ours.step()
    theirs.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.9, 0.3])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("frames", [1, 3, 100])
def test_on_a_gpu_it_is_equal(dtype, beta, kernels, frames):
    shapes = (*SHAPES, (513, 700), (1024, 300))
    one, other = parameters(dtype, "cuda", shapes), parameters(dtype, "cuda", shapes)
    size = 1 << 18
    ours = PagedAdamW(one, resident_bytes=frames * size, page_bytes=size, **settings(beta, dtype))
    ours.kernels = kernels
    theirs = torch.optim.AdamW(other, foreach=False, fused=False, **settings(beta, dtype))
    for step in range(20):
        gradients(step, one, other, missing=(1, 7) if step == 5 else ())
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    mine, their = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert all(torch.equal(mine[k][n].cpu(), their[k][n].cpu()) for k in their for n in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.gpu
def test_numbers_too_small_to_be_normal():
    """Unused rows: their moments shrink below 1e-38 and are still the loop's."""
    one, other = parameters(torch.float32, "cuda"), parameters(torch.float32, "cuda")
    settings_ = dict(lr=1e-2, eps=0.0)
    ours, theirs = PagedAdamW(one, page_bytes=1 << 18, **settings_), torch.optim.AdamW(other, foreach=False, **settings_)
    for step in range(3):
        gradients(step, one, other)
        for p, q in zip(one, other, strict=True):
            p.grad.mul_(1e-22)
            q.grad.mul_(1e-22)
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True) if p.isfinite().all())


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_a_resume_still_pages():
    one = parameters(torch.float32, "cuda", ((1 << 22,),))
    ours = PagedAdamW(one, resident_bytes=1 << 22, page_bytes=1 << 20)
    gradients(0, one)
    ours.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # clock cycles: the device is busy for a tenth of a second
    ours.step()
    assert not torch.cuda.current_stream().query()  # and the call has returned
    again = PagedAdamW(one, resident_bytes=1 << 22, page_bytes=1 << 20)
    before = torch.cuda.memory_allocated()
    again.load_state_dict(ours.state_dict())
    for _ in range(2):
        again.step()
    assert torch.cuda.memory_allocated() - before < (1 << 22) + (1 << 20)  # the frames and a table
    assert all(page.host.is_pinned() for page in again.layout.pages)


@pytest.mark.gpu
def test_on_a_gpu_the_offloaded_step_is_the_cpus():
    def network(device):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 50)).to(device)

    model, host = network("cuda"), network("cpu")
    ours = OffloadedAdamW(model.parameters(), lr=1e-2, max_norm=1.0, bucket_bytes=1 << 16)
    theirs = torch.optim.AdamW(host.parameters(), lr=1e-2, fused=True)
    for _ in range(20):
        model(torch.randn(64, 300, device="cuda")).square().sum().backward()
        for p, q in zip(model.parameters(), host.parameters(), strict=True):
            q.grad = p.grad.cpu()
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        ours.step()
        theirs.step()
        ours.zero_grad()
    for p, q in zip(model.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q)  # the norm is summed in another order
