"""Reading images: odd folders, broken files, odd modes, real data where there is some."""
import os, time, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest, timm, torch
from PIL import Image

from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.data.images import ImageBatches, eight_bits, find_images, pick_items, transform_for
from fips_nb.measure.accuracy import accuracy

DATA = os.environ.get("FIPS_NB_DATA")


def refused(match): return pytest.raises(ValueError, match=match)


@pytest.fixture(scope="module")
def digits():
    x, y = demo_images("test")
    pixels = ((x[:60, 0]*.5 + .5)*255).round().byte().numpy()
    return [Image.fromarray(p) for p in pixels], y[:60].tolist()


@pytest.fixture
def flat(tmp_path, digits):
    for i, p in enumerate(digits[0]): p.save(tmp_path/f"{i:02}.png")
    return tmp_path


def labelled(folder, text):
    (folder/"labels.csv").write_text(text, encoding="utf-8")
    return folder


def truncate(path, n=60): path.write_bytes(path.read_bytes()[:n])


# ---- folders ----

@pytest.mark.parametrize("text, word", [
    ("", "columns file,label"),
    ("file,label\n", "columns file,label"),
    ("name,class\n00.png,1\n", "columns file,label"),
    ("file,label\n00.png,\n", "label ''"),
    ("file,label\n00.png,-1\n", "'-1'"),
    ("file,label\n00.png,1\n77.png,2\n88.png,2\n", "names 2 files"),
])
def test_broken_labels_csv(flat, text, word):
    with refused(word): find_images(labelled(flat, text))


def test_labels_csv_with_bom_spaces_and_subfolders(flat):
    (flat/"sub").mkdir()
    (flat/"00.png").rename(flat/"sub/00.png")
    labelled(flat, "\ufefffile,label,note\nsub/00.png, 3,x\n01.png,4,y\n")
    assert [(p.name, y) for p, y in find_images(flat)] == [("00.png", 3), ("01.png", 4)]


def test_what_is_no_image_is_left_alone(flat):
    (flat/"readme.txt").write_text("x")
    (flat/".hidden.png").write_bytes(b"")
    (flat/"folder.png").mkdir()
    assert len(find_images(flat)) == 60


def test_class_folders_may_nest_and_be_empty(tmp_path, digits):
    for d in ("b/deep", "a", "c"): (tmp_path/d).mkdir(parents=True)
    digits[0][0].save(tmp_path/"a/x.PNG", format="png")
    digits[0][1].save(tmp_path/"b/deep/y.png")
    assert [(p.name, y) for p, y in find_images(tmp_path)] == [("x.PNG", 0), ("y.png", 1)]


def test_folder_of_empty_folders(tmp_path):
    (tmp_path/"a").mkdir()
    with refused("no images in"):
        find_images(tmp_path)


def test_hugging_face_dataset_reads_labels_as_a_column(digits):
    class Dataset:
        "Like `datasets.Dataset`: an item costs decoding, a column does not."
        column_names, decoded = ["image", "label"], 0
        def __len__(self): return 60
        def __getitem__(self, i):
            if i == "label": return digits[1]
            Dataset.decoded += 1
            return dict(image=digits[0][i], label=digits[1][i])
    items = find_images(Dataset())
    assert [y for _, y in items] == digits[1] and Dataset.decoded == 1
    assert sum(len(x) for x, _ in ImageBatches(items, transform_for(demo_vit()))) == 60


# ---- decoding ----

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "YCbCr", "HSV"])
@pytest.mark.parametrize("model", ["demo-vit", "vit_tiny_patch16_224"])
def test_every_mode_of_image(mode, model):
    m = demo_vit() if model == "demo-vit" else timm.create_model(model)
    x = transform_for(m)(Image.new(mode, (37, 211)))
    assert x.dtype == torch.float32
    assert x.shape == ((1, 8, 8) if model == "demo-vit" else (3, 224, 224))


@pytest.mark.parametrize("mode, most", [("I;16", 65535), ("I", 65535), ("F", 1.), ("F", 255.)])
def test_more_than_eight_bits_are_scaled_not_cut(mode, most):
    ramp = (np.linspace(0, 1, 256)*most).reshape(16, 16)
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    got = np.array(eight_bits(Image.fromarray(ramp.astype(kinds[mode]))))
    assert got.dtype == np.uint8 and abs(got.reshape(-1).astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1., 300.])
def test_pixels_that_are_none(value):
    image = Image.fromarray(np.full((4, 4), value, np.float32))
    with pytest.raises(ValueError, match="pixels of the mode F"): eight_bits(image)


def test_hostile_images(tmp_path):
    "A PostScript file under another name reaches no other program, and a bomb is not decoded."
    (tmp_path/"a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (9000, 9000)).save(tmp_path/"b.png")
    for i in range(2): Image.new("L", (8, 8)).save(tmp_path/f"c{i}.png")
    t = time.perf_counter()
    batches = ImageBatches(find_images(tmp_path)[:1], transform_for(demo_vit()))
    with refused("cannot identify image file"): list(batches)
    batches = ImageBatches(find_images(tmp_path)[1:2], transform_for(demo_vit()))
    with refused("81000000|9000 x 9000 pixels"): list(batches)
    assert time.perf_counter() - t < 2


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "link.png", "deep/../../x.png", "a\0b"])
def test_labels_csv_stays_inside_its_folder(flat, name):
    Image.new("L", (8, 8)).save(flat.parent/"x.png")
    (flat/"link.png").symlink_to(flat.parent/"x.png")
    with refused("names 1 files that are not in"):
        find_images(labelled(flat, f"file,label\n{name},1\n"))


def test_transform_of_a_model_made_smaller():
    m = timm.create_model("vit_tiny_patch16_224", img_size=96, in_chans=1)
    assert transform_for(m)(Image.new("RGB", (300, 200))).shape == (1, 96, 96)


@pytest.mark.parametrize("keep", [0., 2.])
def test_unreadable_images_are_counted_once(flat, keep):
    truncate(flat/"03.png")
    (flat/"04.png").write_bytes(b"")
    (flat/"05.png").write_text("no image")
    batches = ImageBatches(find_images(flat), transform_for(demo_vit()), 10, keep=keep)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter("always")
        sizes = [[len(x) for x in batches] for _ in range(2)]
    assert sizes == [[10]*5 + [7]]*2 and len(batches) == 6
    assert [str(w.message)[:20] for w in ws] == ["left out 3 of 60 ima"]
    assert "03.png" in str(ws[0].message)


def test_too_many_unreadable_images(flat):
    for i in range(7): truncate(flat/f"{i:02}.png")
    with refused(r"7 of the first 60 images are unreadable, such as .*00\.png"):
        list(ImageBatches(find_images(flat), transform_for(demo_vit())))


def test_one_unreadable_image_alone(flat):
    truncate(flat/"00.png")
    with refused("refused beyond 10 %"):
        list(ImageBatches(find_images(flat)[:1], transform_for(demo_vit())))


# ---- subsets and evaluation ----

@pytest.mark.parametrize("n", [1, 9, 10, 11, 59, 60, 99])
def test_subsets_are_even_over_classes(n):
    items = [(i, i % 10) for i in range(60)]
    picked = pick_items(items, n, seed=3)
    assert len(picked) == len(set(picked)) == min(n, 60) and picked == sorted(picked)
    counts = [sum(y == k for _, y in picked) for k in range(10)]
    assert max(counts) - min(counts) <= 1


def test_evaluation_does_not_depend_on_batches():
    m, (x, y) = demo_vit(), demo_images("test")
    a, b = (accuracy(m.train(), list(zip(x[:101].split(k), y[:101].split(k)))) for k in (101, 7))
    assert m.training and a.keys() == b.keys()
    for k in a: assert a[k] == pytest.approx(b[k], rel=1e-5)


def test_two_classes_have_no_top5():
    res = accuracy(torch.nn.Linear(4, 2), [(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))])
    assert "top5" not in res and (res["n"], res["classes"]) == (6, 2)


def test_labels_of_few_classes_are_counted():
    "A model of ten classes on images of three."
    m, (x, y) = demo_vit(), demo_images("test")
    few = y < 3
    assert accuracy(m, list(zip(x[few].split(16), y[few].split(16))))["classes"] == 3


class Pixels(torch.nn.Module):
    "A classifier with the interface of transformers."
    def __init__(self):
        super().__init__()
        self.vit = demo_vit()

    def forward(self, pixel_values, labels=None):
        return SimpleNamespace(logits=self.vit(pixel_values))


def test_batches_and_outputs_as_transformers_has_them():
    x, y = demo_images("test")
    pairs = list(zip(x.split(100), y.split(100)))
    rows = [dict(pixel_values=a, labels=b) for a, b in pairs]
    assert accuracy(Pixels(), rows) == accuracy(demo_vit(), pairs)


def test_modes_of_all_modules_come_back():
    "A frozen part stays in evaluation mode, also after an error."
    m = demo_vit().train()
    m.blocks[0].eval()
    was = [p.training for p in m.modules()]
    x, y = demo_images("test")
    accuracy(m, [(x[:4], y[:4])], dense=demo_vit())
    assert [p.training for p in m.modules()] == was
    with refused("outside the model's classes"):
        accuracy(m, [(x[:1], torch.tensor([10]))])
    assert [p.training for p in m.modules()] == was


@pytest.mark.skipif(not DATA, reason="FIPS_NB_DATA is not set")
def test_real_images():
    items = find_images(Path(DATA)/"imagenet_calib")
    assert len(items) == 1000 and len({y for _, y in items}) == 1000
    transform = transform_for(timm.create_model("vit_tiny_patch16_224"))
    x, y = next(iter(ImageBatches(items, transform, n=4)))
    assert x.shape == (4, 3, 224, 224) and -1 <= x.min() < -.5 and .5 < x.max() <= 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_turned_upright(turn, tmp_path):
    photo = Image.new("RGB", (6, 4))
    photo.putpixel((0, 0), (255, 0, 0))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4} # what a camera does to a photo that is kept so
    turned = photo if turn == 1 else photo.transpose(back[turn])
    exif = Image.Exif()
    exif[0x0112] = turn
    turned.save(tmp_path/"photo.png", exif=exif)
    with Image.open(tmp_path/"photo.png") as image: upright = eight_bits(image).copy()
    assert upright.size == (6, 4) and upright.getpixel((0, 0)) == (255, 0, 0)
