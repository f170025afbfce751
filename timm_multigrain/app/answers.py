"""What the web app shows, computed without gradio: nearest images, their classes, one of them large, copies."""
import base64
import functools
import io
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image

from timm_multigrain.files import check_json, printable
from timm_multigrain.images.labels import class_names
from timm_multigrain.images.pixels import UnreadableImage, read_image
from timm_multigrain.index.dedup import find_copies
from timm_multigrain.index.model import cut, embed_queries
from timm_multigrain.index.records import Record, top_classes
from timm_multigrain.report.collection import class_caption, copies_page, indexed_picture
from timm_multigrain.report.page import file_size, thumbnail

if TYPE_CHECKING:
    from timm_multigrain.index.index import Index

SMALL, LARGE = 400, 1200  # pixels of the longer side of the pictures that are drawn
MAX_HITS = 100
MAX_PIXELS = 50_000_000  # of a picture to search for: larger ones are refused before they are decoded
SMALLEST_PART = 8  # pixels
CACHED_PICTURES = 500
QUESTION = {
    'picture': (None, str), 'row': (None, int), 'part': (None, [float]), 'k': int, 'class_name': str, 'category': str}


class Answers:
    """The questions of the web app to one index; without `places`, files are named as below the indexed folders only,
    and copies, whose page has to say where they are, are not shown."""

    def __init__(self, index: 'Index', places: bool = True):
        self.index, self.places = index, places
        self._one, self._other = threading.Lock(), threading.Lock()  # of the model, and the memory it takes; of copies
        self._exif, self._copies = index.protocol().exif, None
        self._small = functools.lru_cache(CACHED_PICTURES)(functools.partial(self._drawn, side=SMALL))

    @property
    def class_names(self) -> list[str]:
        """Names to filter by, those that are the most probable class of some image."""
        numbers = sorted(set(self.index.columns['classes'][:, 0].tolist()) - {-1})
        return class_names(map(self.index.class_name, numbers))

    def search(self, question: dict) -> dict:
        """The 'k' images nearest to a 'picture' (base64) or to the image of a 'row', or to a 'part' of it (left, top,
        width and height as fractions), of a 'class_name' and a 'category' ('' for any).

        Returns:
            The query drawn, its most probable classes, and of each hit the row, score, name, class (of a region its
            category), part and small picture.
        """
        check_json(question, QUESTION, 'The question')
        with self._one:
            image = self._read(question)
            part = image if question['part'] is None else _part(image, question['part'])
            embedded = embed_queries(self.index.model(), self.index.protocol(), [part])
            scores, rows = self.index.search(
                embedded.vectors, min(max(1, question['k']), MAX_HITS), question['class_name'] or None,
                question['category'] or None)
            hits = [self._hit(row, score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)]
            shown = thumbnail(image, LARGE)
        classes = []
        if embedded.logits is not None:
            numbers, probabilities = (values[0].tolist() for values in top_classes(embedded.logits))
            classes = list(zip(map(self.index.class_name, numbers), probabilities, strict=True))
        return {'picture': shown, 'classes': class_caption(classes, 3), 'hits': hits}

    def look(self, question: dict) -> dict:
        """The image of a 'row', drawn large, with where it is."""
        check_json(question, {'row': int}, 'The question')
        record = self._record(question['row'])
        with self._one:
            name = record.path if self.places else self.index.name_of(record.path)
            return {'picture': self._drawn(record, LARGE), 'file': printable(name)}

    def copies(self, question: dict) -> dict:
        """The page that `dedup --html` writes, whose files are not linked to, or how far it is: it is made beside."""
        if not self.places:
            raise ValueError('The page of copies tells where files are: it is shown on this computer, or with --auth.')
        with self._other:
            if self._copies is None:
                self._tell('Comparing all pictures')
                threading.Thread(target=self._compare, daemon=True).start()
            answer = self._copies
            if 'error' in answer:  # the next question tries again
                self._copies = None
            return answer

    def _compare(self) -> None:
        try:
            found = find_copies(self.index, progress=self._tell)
            self._tell('Drawing the groups')
            self._copies = {'page': copies_page(found, 'Copies', self._exif)}
        except Exception as e:  # whatever it is, nobody waits for it any more
            self._copies = {'error': str(e)}

    def _tell(self, text: str) -> None:
        self._copies = {'state': text}

    def _hit(self, row: int, score: float) -> dict:
        record = self._record(row)
        return {'row': row, 'score': f'{score:.3f}', 'name': printable(self.index.name_of(record.path)),
                'picture': self._small(record), 'class': printable(record.category) or class_caption(record.classes),
                'part': record.box and _fractions(record),
                'size': f'{record.width} × {record.height}, {file_size(record.bytes)}'}

    def _record(self, row: int) -> Record:
        if not 0 <= row < len(self.index.image_rows):
            raise ValueError(f'Row {row} is not in the index.')
        return self.index.records(row)

    def _read(self, question: dict) -> Image.Image:
        """The picture that is asked about; UnreadableImage, whose message has no path, if it cannot be used."""
        if question['picture'] is None and question['row'] is None:
            raise ValueError('Give a picture first.')
        if question['row'] is None:
            file, name = io.BytesIO(base64.b64decode(question['picture'])), 'image'
        else:
            file = self._record(question['row']).path
            name = printable(file)
        try:
            return read_image(file, exif=self._exif, max_pixels=MAX_PIXELS)
        except UnreadableImage as e:
            raise UnreadableImage(f'This picture cannot be used: {str(e).removeprefix(f"{name}: ")}.') from e

    def _drawn(self, record: Record, side: int) -> str:
        """A picture of an indexed image; '' if its file cannot be read now."""
        image = indexed_picture(record, self._exif, side)
        return '' if image is None else thumbnail(image, side)



def _fractions(record: Record) -> list[float]:
    """Left, top, width and height of a region."""
    left, top, right, bottom = record.box
    return [left / record.width, top / record.height, (right - left) / record.width, (bottom - top) / record.height]


def _part(image: Image.Image, part: list[float]) -> Image.Image:
    """The part (left, top, width, height as fractions) of a picture."""
    if len(part) != 4:
        raise ValueError('A part is left, top, width and height.')
    crop = [value * side for value, side in zip(part, image.size * 2, strict=True)]
    if min(crop[2:]) < SMALLEST_PART:
        raise ValueError(f'That part has {crop[2]:.0f} × {crop[3]:.0f} pixels: draw a larger one.')
    return cut(image, crop, 'the picture')


def answering(answer: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """An answer that says in a sentence, as 'error', what is wrong with its question."""
    @functools.wraps(answer)
    def answered(question: dict) -> dict:
        try:
            return answer(question)
        except ValueError as e:
            return {'error': str(e)}
    return answered
