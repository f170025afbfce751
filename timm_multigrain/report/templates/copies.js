'use strict';
const form = document.getElementById('marks');
const groups = [...form.querySelectorAll('section')];
const figuresOf = (group) => [...group.querySelectorAll('figure')];
const isSurplus = (figure) => figure.querySelector('.mark').ariaPressed === 'true';
const size = (bytes) => (bytes >= 1e6 ? (bytes / 1e6).toFixed(1) + ' MB' : Math.round(bytes / 1e3) + ' kB');

function update() {
  const chosen = new Map();
  for (const figure of form.querySelectorAll('figure')) {
    const surplus = isSurplus(figure), mark = figure.querySelector('.mark');
    mark.textContent = surplus ? 'Surplus' : 'Keep';
    figure.classList.toggle('surplus', surplus);
    if (surplus) chosen.set(figure.dataset.path, Number(figure.dataset.bytes));
  }
  const bytes = [...chosen.values()].reduce((sum, one) => sum + one, 0);
  form.querySelector('output').textContent = `${chosen.size} surplus, ${size(bytes)}`;
}

// [surplus file, file that is kept for it]; identical files first, for one of them may be surplus to another picture
function surplus() {
  const pairs = new Map();
  for (const kind of ['exact', 'near']) {
    for (const group of groups.filter((one) => one.dataset.kind === kind)) {
      const kept = figuresOf(group).find((figure) => !isSurplus(figure));
      for (const figure of figuresOf(group).filter(isSurplus)) {
        if (!pairs.has(figure.dataset.path)) pairs.set(figure.dataset.path, [figure, kept]);
      }
    }
  }
  return [...pairs.values()];
}

function save(name, text) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'text/plain' }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const path = (figure) => JSON.parse(figure.dataset.path);
const quote = (text) => "'" + text.replaceAll("'", "'\\''") + "'";

form.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const figure = button.closest('figure');
  if (button.className === 'mark') {
    const others = figuresOf(figure.closest('section')).filter((one) => one !== figure && !isSurplus(one));
    if (isSurplus(figure) || others.some((one) => one.dataset.path)) {
      button.ariaPressed = String(!isSurplus(figure));
    } else {
      button.title = 'One file of a group has to stay';
    }
    update();
  } else if (button.className === 'flip') {
    flip(figure);
  } else if (button.id === 'list') {
    save('surplus.txt', surplus().map(([one]) => path(one) + '\n').join(''));
  } else {
    const lines = surplus().map(([one, kept]) =>
      `move ${quote(path(one))} ${one.dataset.sha256} ${quote(path(kept))} ${kept.dataset.sha256}\n`);
    save('move-surplus.sh', JSON.parse(form.dataset.header) + lines.join('') + JSON.parse(form.dataset.footer));
  }
});

function flip(figure) {
  const button = figure.querySelector('.flip'), image = figure.querySelector('img');
  const kept = figure.closest('section').querySelector('figure img');
  if (!button || !image || !kept) return;
  image.dataset.own ??= image.src;
  const flipped = button.ariaPressed !== 'true';
  button.ariaPressed = String(flipped);
  button.textContent = flipped ? 'The first' : 'Flip';
  image.src = flipped ? kept.src : image.dataset.own;
}

document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const here = groups.indexOf(document.activeElement.closest('section'));
  const step = { n: 1, p: -1 }[event.key.toLowerCase()];
  if (step) {
    const next = groups[Math.max(0, Math.min(groups.length - 1, here + step))];
    next?.focus();
    next?.scrollIntoView({ block: 'start' });
  } else if (event.key.toLowerCase() === 'f') {
    const group = groups[Math.max(0, here)];
    const figure = document.activeElement.closest('figure') ?? group?.querySelector('figure:nth-of-type(2)');
    if (figure) flip(figure);
  }
});
update();
