// Runs inside gradio: `element` holds the page, `props.value` what it shows, `server` asks `Answers`.
const find = (selector) => element.querySelector(selector);
const [query, dialog, state, number, ofClass, ofCategory] = [
  '#query', '#large', '#state', '#number', '#class', '#category'].map(find);
element.addEventListener('load', ({ target: image }) => {
  if (image.naturalHeight) image.parentElement.style.setProperty('--ratio', image.naturalWidth / image.naturalHeight);
}, true);
const frame = query.querySelector('.frame'), shown = props.value;
const trail = []; // the pictures that were searched for, the present one last: { picture or row, part }
let hits = [], open = 0, asked = 0, waiting;

find('h1').textContent = shown.title;
find('[data-show=copies]').hidden = !shown.copies;
for (const [select, names] of [[ofClass, shown.classes], [ofCategory, shown.categories]]) {
  select.append(...names.map((name) => new Option(name, name)));
  select.closest('label').hidden = !names.length;
}
number.max = shown.most;

function tell(text, warn = false) {
  state.textContent = text;
  state.classList.toggle('warn', warn);
}

async function ask(name, question) {
  const answer = await server[name](question);
  if (answer.error) throw new Error(answer.error);
  return answer;
}

async function search() {
  const now = ++asked, here = trail.at(-1);
  clearTimeout(waiting);
  if (!here) return;
  drawPart();
  find('#search').classList.add('busy');
  tell('Searching');
  try {
    const answer = await ask('search', { picture: here.picture ?? null, row: here.row ?? null, part: here.part,
      k: Number(number.value) || 1, class_name: ofClass.value, category: ofCategory.value });
    if (now !== asked) return;
    here.seen = true;
    query.hidden = false;
    for (const image of [frame, dialog].map((one) => one.querySelector('img'))) image.src = answer.picture;
    find('#classes').textContent = answer.classes;
    find('#back').hidden = trail.length < 2;
    hits = answer.hits;
    find('#hits').replaceChildren(...hits.map(button));
    tell(hits.length ? `${hits.length} found, the nearest first; 1.000 is the same picture.` : 'Nothing found.');
  } catch (error) {
    if (now !== asked) return;
    if (!here.seen) trail.pop(); // a picture that cannot be used
    tell(error.message, true);
  } finally {
    if (now === asked) find('#search').classList.remove('busy');
  }
}

function button(hit, i) {
  const [made, score, faint] = ['button', 'strong', 'span'].map((name) => document.createElement(name));
  const image = new Image();
  made.type = 'button';
  score.textContent = hit.score;
  faint.className = 'faint';
  faint.textContent = hit.class;
  image.alt = hit.picture ? '' : 'The file cannot be read now.';
  image.src = hit.picture;
  const name = hit.name.split(/(?<=[/_. -])/).flatMap((part) => [part, document.createElement('wbr')]); // not in words
  made.append(image, score, ' ', ...name, document.createElement('br'), faint);
  made.onclick = () => look(i);
  return made;
}

// a picture to search for, from a file or from the index
function take(picture) {
  trail.push({ part: null, ...picture });
  dialog.close();
  search();
}

function read(file) {
  if (!file) return;
  if (file.size > shown.largest) {
    tell(`This picture has ${(file.size / 1e6).toFixed(0)} MB: ${(shown.largest / 1e6).toFixed(0)} are taken.`, true);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => take({ picture: reader.result.split(',')[1] ?? '' });
  reader.readAsDataURL(file);
}

function drawPart() {
  const part = trail.at(-1).part;
  for (const box of element.querySelectorAll('.part')) {
    box.hidden = !part;
    if (part) ['left', 'top', 'width', 'height'].forEach((side, i) => { box.style[side] = `${100 * part[i]}%`; });
  }
  find('#whole').hidden = !part;
}

const within = (value, low, high) => Math.min(high, Math.max(low, value));
const place = (event) => {
  const box = frame.getBoundingClientRect();
  return [within((event.clientX - box.left) / box.width, 0, 1), within((event.clientY - box.top) / box.height, 0, 1)];
};
let start = null;
frame.addEventListener('pointerdown', (event) => {
  start = place(event);
  frame.setPointerCapture(event.pointerId);
});
frame.addEventListener('pointermove', (event) => {
  if (!start) return;
  const [x, y] = start, [a, b] = place(event);
  trail.at(-1).part = [Math.min(x, a), Math.min(y, b), Math.abs(x - a), Math.abs(y - b)];
  drawPart();
});
frame.addEventListener('pointerup', () => {
  const here = trail.at(-1);
  if (here.part && Math.min(here.part[2] * frame.clientWidth, here.part[3] * frame.clientHeight) < 5) here.part = null;
  start = null;
  search();
});
frame.addEventListener('pointercancel', () => { start = null; });
frame.addEventListener('keydown', (event) => {
  const step = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] }[event.key];
  const here = trail.at(-1), [x, y, width, height] = here.part ?? [0.25, 0.25, 0.5, 0.5];
  if (!step && event.key !== 'Escape') return;
  event.preventDefault();
  if (!step) here.part = null;
  else if (event.shiftKey) here.part = [x, y, within(width + step[0], 0.1, 1 - x), within(height + step[1], 0.1, 1 - y)];
  else here.part = [within(x + step[0], 0, 1 - width), within(y + step[1], 0, 1 - height), width, height];
  drawPart();
  clearTimeout(waiting);
  waiting = setTimeout(search, 400);
});

async function look(i) {
  open = i;
  const hit = hits[i], [, image] = dialog.querySelectorAll('img'), save = dialog.querySelector('a');
  const facts = [`${i + 1}. ${hit.score}`, hit.class, hit.size].filter(Boolean);
  image.src = hit.picture;
  dialog.querySelectorAll('figcaption')[1].textContent = facts.join(', ');
  dialog.querySelector('code').textContent = hit.name;
  if (!dialog.open) dialog.showModal();
  try {
    const answer = await ask('look', { row: hit.row });
    if (hits[open] !== hit) return;
    dialog.querySelector('code').textContent = answer.file;
    image.src = save.href = answer.picture;
    image.alt = answer.picture ? hit.name : 'The file cannot be read now.';
    save.hidden = !answer.picture;
    save.download = hit.name.split('/').pop().replace(/\.[^.]*$/, '') + '.jpg';
  } catch (error) {
    dialog.querySelector('code').textContent = error.message;
  }
}

const actions = {
  ArrowLeft: () => look((open + hits.length - 1) % hits.length),
  ArrowRight: () => look((open + 1) % hits.length),
  with: () => take({ row: hits[open].row, part: hits[open].part }),
  copy: () => {
    getSelection().selectAllChildren(dialog.querySelector('code'));
    document.execCommand('copy'); // the newer way is not there without https
  },
  close: () => dialog.close(),
};
dialog.addEventListener('click', (event) => actions[event.target.dataset.do]?.());
dialog.addEventListener('keydown', (event) => actions[event.key]?.());

find('#file').onchange = (event) => { read(event.target.files[0]); event.target.value = ''; };
find('#whole').onclick = () => { trail.at(-1).part = null; search(); };
find('#back').onclick = () => { trail.pop(); search(); };
number.onchange = ofClass.onchange = ofCategory.onchange = search;
addEventListener('paste', (event) => read(event.clipboardData.files[0]));
addEventListener('dragover', (event) => event.preventDefault());
addEventListener('drop', (event) => { event.preventDefault(); read(event.dataTransfer.files[0]); });

let copies = null;
find('nav').addEventListener('click', (event) => {
  const name = event.target.dataset.show;
  if (!name) return;
  for (const tab of find('nav').children) tab.setAttribute('aria-current', tab === event.target ? 'page' : 'false');
  find('#search').hidden = name !== 'search';
  find('#copies').hidden = name !== 'copies';
  if (name === 'copies') copies ??= compare();
});

async function compare() {
  const iframe = find('iframe'), text = find('#copies p');
  try {
    let answer = await ask('copies', {});
    for (; answer.state; answer = await ask('copies', {})) {
      text.textContent = answer.state;
      await new Promise((done) => { setTimeout(done, 500); });
    }
    iframe.srcdoc = answer.page;
    [iframe.hidden, text.hidden] = [false, true];
  } catch (error) {
    [copies, text.textContent] = [null, error.message];
  }
}
