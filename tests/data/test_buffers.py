import threading

import torch

from qtdog.data.augment import BufferPool


def test_memory_in_use_is_never_handed_out_again() -> None:
    pool = BufferPool()
    held = [pool.take((100,), torch.float32) for _ in range(20)]
    assert len({tensor.data_ptr() for tensor in held}) == 20


def test_a_view_keeps_the_memory() -> None:
    pool = BufferPool()
    view = pool.take((4, 25), torch.float32)[1:2].permute(1, 0)
    view.fill_(7)
    pool.take((4, 25), torch.float32).fill_(0)
    assert view.unique().tolist() == [7]


def test_what_autograd_saved_keeps_the_memory() -> None:
    pool = BufferPool()
    weight = torch.ones(100, requires_grad=True)
    product = (weight * pool.take((100,), torch.float32).fill_(3)).sum()
    pool.take((100,), torch.float32).fill_(0)
    product.backward()
    assert weight.grad is not None
    assert weight.grad.unique().tolist() == [3]


def test_freed_memory_comes_back_whatever_the_type() -> None:
    pool = BufferPool()
    address = pool.take((8,), torch.float32).data_ptr()
    assert pool.take((32,), torch.uint8).data_ptr() == address


def test_no_more_is_kept_than_asked_for() -> None:
    pool = BufferPool(n_kept=2)
    held = [pool.take((1000,), torch.uint8) for _ in range(5)]
    addresses = {tensor.data_ptr() for tensor in held}
    del held
    again = [pool.take((1000,), torch.uint8) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} <= addresses
    assert sum(len(buffers) for buffers in pool._free.values()) == 0


def test_threads_never_share_memory() -> None:
    pool, clashes = BufferPool(), []

    def work(number: int) -> None:
        for _ in range(300):
            tensor = pool.take((64,), torch.int64).fill_(number)
            if tensor.unique().tolist() != [number]:
                clashes.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
