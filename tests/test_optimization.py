"""The optimizer's schedule, clipping and moving average."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from pecn.optimization import averaged_weights, create_lr_scheduler


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_every_schedule_honours_its_warm_up(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_lr_scheduler(name, optimizer, 10, 100)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert all(rate > 0.85 for rate in rates[11:])


def test_average_leaves_the_weights_as_they_were_even_after_an_error():
    model = torch.nn.Linear(2, 2)
    ema = EMAModel(model.parameters())
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    with pytest.raises(RuntimeError), averaged_weights(ema, model):
        assert all(torch.equal(now, old) for now, old in zip(model.parameters(), before))
        raise RuntimeError
    assert all(torch.equal(now, old + 1) for now, old in zip(model.parameters(), before))
