"""Draws search.png: python .github/images/search.py DEMO in an empty folder, DEMO being an output of the demo.

Leaves photos/ there, the held-out pictures and edited copies of three, and photos.index, which guides show outputs of.
"""
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from timm_multigrain import Index, open_model
from timm_multigrain.images.copies import COPY_TRANSFORMS, crop

NAMES = 'fish_0000', 'sailboat_0000', 'flower_0000'  # the first ones, not chosen
SIDE, GAP, TOP, FOUND = 104, 8, 40, 3
demo = Path(sys.argv[1])
shutil.copytree(demo / 'pictures' / 'val', 'photos')
Path('photos/edited').mkdir()
for name in NAMES:
    picture = Image.open(f'photos/{name[:-5]}/{name}.jpg')
    for kind in ('jpeg', 'colour', 'mirror', 'text'):
        COPY_TRANSFORMS[kind](picture).save(f'photos/edited/{name}_{kind}.jpg', quality=90)
    crop(picture, 0.8).save(f'photos/edited/{name}_crop.jpg', quality=90)
shutil.copytree(demo / 'model', 'my-model')
index = Index.build(['photos'], 'photos.index', open_model('my-model'))

columns = [GAP + column * (SIDE + GAP) + 2 * GAP * ((column > 0) + (column > FOUND)) for column in range(1 + 2 * FOUND)]
page = Image.new('RGB', (columns[-1] + SIDE + GAP, TOP + len(NAMES) * (SIDE + 26)), 'white')
draw = ImageDraw.Draw(page)
for column, title in (0, 'query, its class'), (1, 'nearest other pictures'), (1 + FOUND, 'nearest edited copies'):
    draw.text((columns[column], 14), title, 'black', ImageFont.load_default(14))
for row, name in enumerate(NAMES):
    y = TOP + row * (SIDE + 26)
    hits = index.search_images([f'photos/{name[:-5]}/{name}.jpg'], k=len(index))[0]
    query = next(hit for hit in hits if Path(hit.path).stem == name)
    copies = [hit for hit in hits if Path(hit.path).parent.name == 'edited']
    others = [hit for hit in hits if hit not in copies and hit is not query]
    shown = others[:FOUND] + copies[:FOUND]
    texts = ['{} {:.0%}'.format(*query.record.classes[0]), *(f'{hit.score:.2f}' for hit in shown)]
    for x, hit, text in zip(columns, [query, *shown], texts, strict=True):
        page.paste(Image.open(hit.path).resize((SIDE, SIDE), Image.LANCZOS), (x, y))
        draw.text((x, y + SIDE + 3), text, 'black', ImageFont.load_default(12))
page.quantize(256, dither=Image.Dither.NONE).save(Path(__file__).with_name('search.png'), optimize=True)
