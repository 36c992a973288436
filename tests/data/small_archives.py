"""Small archives that are laid out as those of the benchmarks are; `conftest.py` runs this file for its functions."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from qtdog.data.cards import CARDS, DatasetCard


def zip_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tar_of(files: dict[str, bytes], mode: Any = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def picture(rng: np.random.Generator, kind: str = "JPEG", size: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def folders(card: DatasetCard, pattern: str, per_class: int = 3) -> dict[str, bytes]:
    rng = np.random.default_rng(len(pattern))
    return {
        pattern.format(domain=domain, label=label, i=i): picture(rng, size=8)
        for domain in card.domains or ()
        for label in (card.classes or ())
        for i in range(per_class)
    }


def domainnet(card: DatasetCard) -> dict[str, bytes]:
    """Six archives, each with one image too many, and the twelve lists."""
    files: dict[str, bytes] = {}
    classes = tuple(card.classes or ())[:3]
    small = DatasetCard("d", "D", domains=card.domains, classes=classes)
    for domain in card.domains or ():
        inside = {k: v for k, v in folders(small, "{domain}/{label}/{i}.jpg", 5).items() if k.startswith(f"{domain}/")}
        files[f"{domain}.zip"] = zip_of(inside | {f"{domain}/{classes[-1]}/duplicate.jpg": b"a copy"})
        lines = [f"{name} {classes.index(name.split('/')[1])}\n" for name in inside]
        files[f"{domain}_train.txt"] = "".join(lines[:-2]).encode()
        files[f"{domain}_test.txt"] = "".join(lines[-2:]).encode()
    return files


def camera_traps(card: DatasetCard) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    names = [*(card.classes or ()), "car"]
    images, annotations, pictures = [], [], {}
    for place in (38, 43, 46, 100, 7):
        for c in range(len(names)):
            for i in range(2):
                name = f"{place}-{c}-{i}"
                pictures[f"eccv_18_all_images_sm/{name}.jpg"] = picture(rng, size=8)
                images.append({"id": name, "location": place, "file_name": f"{name}.jpg"})
                annotations.append({"image_id": name, "category_id": c})
    categories = [{"id": c, "name": name} for c, name in enumerate(names)]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    halves = [tree | {"annotations": annotations[::2]}, tree | {"annotations": annotations[1::2]}]
    lists = {
        f"eccv_18_annotation_files/{n}_annotations.json": json.dumps(half).encode() for n, half in enumerate(halves)
    }
    return {"eccv_18_all_images_sm.tar.gz": tar_of(pictures), "eccv_18_annotations.tar.gz": tar_of(lists)}


def mnist() -> dict[str, bytes]:
    rng = np.random.default_rng(0)

    def packed(array: np.ndarray) -> bytes:
        sizes = np.array(array.shape, dtype=">u4").tobytes()
        return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())

    files = {}
    for part, n in (("train", 200), ("t10k", 40)):
        files[f"{part}-images-idx3-ubyte.gz"] = packed(rng.integers(0, 255, (n, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte.gz"] = packed((np.arange(n) % 10).astype(np.uint8))
    return files


def camelyon() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rows, files = [",patient,node,x_coord,y_coord,tumor,slide,center,split"], {}
    for i in range(100):
        center, tumor, split = i % 5, (i // 5) % 2, int(i >= 80)
        slide = f"patient_00{center}_node_1"
        rows.append(f"{i},00{center},1,{i},7,{tumor},{center},{center},{split}")
        files[f"camelyon17_v1.0/patches/{slide}/patch_{slide}_x_{i}_y_7.png"] = picture(rng, "PNG", 12)
    files["camelyon17_v1.0/metadata.csv"] = "\n".join(rows).encode()
    return {"camelyon17_v1.0.tar.gz": tar_of(files)}


def amazon() -> dict[str, bytes]:
    rows = ['"reviewerID","asin","overall","reviewText","reviewYear","category"']
    splits = ["split,clean"]
    for i in range(60):
        part = (0, 0, 2, 4, 1, 3, -1)[i % 7]
        user = f"{'seen' if part in (0, 2, 4) else 'test' if part == 3 else 'val'}{i % 3}"
        rows.append(f'"{user}","p{i}",{i % 5 + 1}.0,"It said ""{i}"",\nand more, ü","2012","Books"')
        splits.append(f"{part},True")
    files = {
        "amazon_v2.0/reviews.csv": "\n".join(rows).encode(),
        "amazon_v2.0/splits/user.csv": "\n".join(splits).encode(),
    }
    return {"amazon_v2.0.tar.gz": tar_of(files)}


def published(name: str) -> dict[str, bytes]:
    card = CARDS[name]
    return {
        "pacs": lambda: {"pacs.zip": zip_of(folders(card, "kfold/{domain}/{label}/{i}.jpg"))},
        "vlcs": lambda: {"vlcs.tar.gz": tar_of(folders(card, "VLCS/{domain}/{label}/{i}.jpg"))},
        "office-home": lambda: {
            "office_home.zip": zip_of(folders(card, "OfficeHomeDataset_10072016/{domain}/{label}/{i}.jpg", 1))
        },
        "digits-dg": lambda: {
            "digits_dg.zip": zip_of(
                folders(card, "digits_dg/{domain}/train/{label}/{i}.jpg", 2)
                | folders(card, "digits_dg/{domain}/val/{label}/{i}.jpg", 1)
            )
        },
        "domainnet": lambda: domainnet(card),
        "terra-incognita-24330": lambda: camera_traps(card),
        "terra-incognita-24788": lambda: camera_traps(card),
        "colored-mnist": mnist,
        "rotated-mnist": mnist,
        "camelyon17": camelyon,
        "amazon-reviews": amazon,
    }[name]()
