"""pipeline/sources/inaturalist.py: iNaturalist's JSON files and folders."""

import json

import pytest
from tiny_sets import open_set, save

from errors import DataError, OptionError
from pipeline.sources.inaturalist import INatDataset


def write_inat(root, year, shortened):
    levels = [
        {"id": i, "kingdom": k, "name": f"species {i}", "genus": f"g{i // 2}"}
        for i, k in enumerate(["Plantae", "Animalia", "Animalia"])
    ]
    (root / "categories.json").write_text(json.dumps(levels))
    for part, categories in (("train", [2, 0, 1, 2]), ("val", [1, 2])):
        images, annotations = [], []
        for i, category in enumerate(categories):
            number = i + 100 * (part == "val")
            folder = f"train_val{year}"
            name = f"{folder}/{levels[category]['kingdom']}/{category}/{number}.jpg"
            where = f"{folder}/{category}/{number}.jpg" if shortened else name
            save(root / where, seed=number, quality=95)
            images.append({"id": number, "file_name": name})
            annotations.append({"image_id": number, "category_id": category})
        text = json.dumps({"images": images, "annotations": annotations[::-1][::-1]})
        (root / f"{part}{year}.json").write_text(text)


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize("shortened", [False, True])
def test_inaturalist(tmp_path, name, year, shortened):
    write_inat(tmp_path, year, shortened)
    train, val = (open_set(name, tmp_path, t) for t in (True, False))
    # as in DeiT: classes in the order of the training annotations
    assert train.classes == val.classes == ["species 2", "species 0", "species 1"]
    assert train.targets.tolist() == [0, 1, 2, 0]
    assert val.targets.tolist() == [2, 0]
    assert val[1].target == 0 and not val[1].bad
    kingdoms = open_set(name, tmp_path, False, inat_category="kingdom")
    assert kingdoms.classes == ["Animalia", "Plantae"] and kingdoms.targets.tolist() == [0, 0]
    assert INatDataset(tmp_path, year=year, category="genus").classes == ["g1", "g0"]


def test_inaturalist_mistakes(tmp_path):
    with pytest.raises(OptionError, match=r"categories\.json does not exist"):
        open_set("INAT", tmp_path)
    write_inat(tmp_path, 2018, False)
    with pytest.raises(OptionError, match="--inat-category: 'order' is not in"):
        open_set("INAT", tmp_path, inat_category="order")
    with pytest.raises(OptionError, match=r"train2019\.json does not exist"):
        open_set("INAT19", tmp_path)
    train = json.loads((tmp_path / "train2018.json").read_text())
    few = {key: values[:3:2] for key, values in train.items()}
    (tmp_path / "train2018.json").write_text(json.dumps(few))
    assert open_set("INAT", tmp_path, False).classes == ["species 2", "species 1"]
    fewer = {key: values[:1] for key, values in train.items()}
    (tmp_path / "train2018.json").write_text(json.dumps(fewer))
    with pytest.raises(DataError, match="not in train2018.json: species 1"):
        open_set("INAT", tmp_path, False)
    (tmp_path / "val2018.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(DataError, match="iNaturalist's form"):
        open_set("INAT", tmp_path, False)
    (tmp_path / "val2018.json").write_text("{")
    with pytest.raises(DataError, match=r"val2018\.json can't be read"):
        open_set("INAT", tmp_path, False)
