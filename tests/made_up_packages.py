"""Small packages of clip art and emoji, in the forms of Debian's and npm's."""

import io
import json
import tarfile
import zlib
from pathlib import Path

from helpers import encode_image, random_picture
from PIL import Image

ANIMALS = "ant bear cat dog eel fox goat hen ibis jay koala lion mole newt owl pig quail rat seal toad".split()
PLACES = "attic barn cave desert field".split()
SVG = """<svg><metadata><dc:title> {title} </dc:title><rdf:li>hash</rdf:li><rdf:li>wild_life</rdf:li><rdf:li>zoo</rdf:li>
<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>
<cc:license rdf:resource="{licence}"/></metadata>{body}</svg>"""
LINKED = '<image width="3" xlink:href="absent.png"/>'


def tar_bytes(files: dict[str, bytes], mode: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("./usr/share/openclipart/png/animals/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "cat_attic.png"
        tar.addfile(link)
    return content.getvalue()


def write_deb(file: Path, files: dict[str, bytes]) -> None:
    """A Debian package whose second member has an odd size."""
    content = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar_bytes(files, "w:xz"))):
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    file.write_bytes(content)


def drawings_and_pictures() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of both packages of clip art: 100 titles of two drawings with a black-and-white copy, then what is left out."""
    drawings, pictures = {}, {}

    def add(source: str, title: str, picture: Image.Image, **about: str) -> None:
        svg = SVG.format(**{"title": title, "author": "Ann Example", "body": "", "licence": "any/PublicDomain"} | about)
        drawings[f"./usr/share/openclipart/svg/{source}.svg"] = svg.encode()
        pictures[f"./usr/share/openclipart/png/{source}.png"] = encode_image(picture)

    titles = [f"{animal} {place}" for animal in ANIMALS for place in PLACES]
    for number, title in enumerate(titles):
        name = title.replace(" ", "_")
        add(f"animals/{name}", title, random_picture(number))
        add(f"animals/{name}_again", title, random_picture(500 + number))
        add(f"animals/{name}_bw", f"{title} (B and W)", random_picture(1000 + number))
    for number in range(14):
        add(f"people/zebra{number}_ann_exam_01", "Clip art of Ann", random_picture(2000 + number))
    add("left/equal", "equal", random_picture(0))
    add("left/blank", "blank", Image.new("RGBA", (40, 40), (9, 9, 9, 0)))
    add("left/tiny", "tiny", random_picture(3000, (200, 9)))
    add("left/linked", "linked", random_picture(3001), body=LINKED)
    add("left/licensed", "licensed", random_picture(3005), licence="any/GPL/2.0/")
    add("left/flat-theme/kinternet", "icon", random_picture(3002))
    add("left/cavallo", "Cavallo", random_picture(3003), author="Architetto Francesco Rollandin")
    add("left/123", "4", random_picture(3004))
    return drawings, pictures


def emoji_files(style: str) -> dict[str, bytes]:
    """The files of a package of emoji: ten of each of three subcategories, a job in three variants, and a skin tone."""
    files, table = {}, []

    def add(name: str, code: str, subcategory: str, category: str = "Animals & Nature", seed: int | None = None) -> None:
        about = {"name": name.upper(), "unified": code.upper(), "image": f"{code}.png", "category": category}
        table.append(about | {"subcategory": subcategory, "short_names": [name.replace(" ", "_"), f"small_{name}"]})
        number = zlib.crc32(f"{style} {code}".encode()) if seed is None else seed
        picture = random_picture(number, (64, 64))
        files[f"package/img/{style}/64/{code}.png"] = encode_image(picture)
        files[f"package/img/{style}/sheets/{code}.png"] = b"no picture"

    for number, animal in enumerate(ANIMALS[:10]):
        add(animal, f"1f4{number:02}", "animal-bird")
        add(f"{animal} food", f"1f5{number:02}", "food-sweet", "Food & Drink")
        for word, code in (("man", "1f468"), ("woman", "1f469"), ("person", "1f9d1")):
            add(f"{word} {animal} keeper", f"{code}-200d-1f6{number:02}", "person-role", "People & Body")
    add("twin", "1f700", "flag", "Flags", seed=1)
    add("other twin", "1f701", "flag", "Flags", seed=1)
    add("tone", "1f3fb", "skin-tone", "Component")
    return files | {"package/emoji.json": json.dumps(table).encode()}
