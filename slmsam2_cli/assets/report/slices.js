/* The strips: describe the slice under the pointer or the selected slice, and open the slice of a picture that is clicked. */
const SVG = 'http://www.w3.org/2000/svg';
const FIELDS = ['slice', 'prediction', 'reference', 'dice', 'prompted', 'distance', 'confidence', 'disagreement'];

const markOf = (structure, slice) => {
  const found = structure.slices.find((mark) => mark[0] === slice);
  return found ? Object.fromEntries(FIELDS.map((name, index) => [name, found[index]])) : null;
};

function describe(structure, slice) {
  const mark = markOf(structure, slice);
  if (!mark) return 'empty';
  const parts = [];
  if (mark.reference === 0 && mark.prediction > 0) parts.push('false positive: not in the reference');
  else if (mark.reference > 0 && mark.prediction === 0) parts.push('missed');
  else if (mark.dice !== null) parts.push(`Dice ${mark.dice.toFixed(3)}`);
  parts.push(mark.reference === null ? `${mark.prediction} px` : `${mark.prediction} px, reference ${mark.reference} px`);
  if (mark.prompted) parts.push('annotated');
  else if (mark.distance !== null) parts.push(`${Math.abs(mark.distance)} slice${Math.abs(mark.distance) === 1 ? '' : 's'} from the prompt`);
  if (mark.confidence !== null) parts.push(`confidence ${mark.confidence.toFixed(3)}`);
  if (mark.disagreement !== null) parts.push(`disagreement ${mark.disagreement.toFixed(3)}`);
  return parts.join(', ');
}

function pointAt(place, slice, kind) {
  const item = data.cases[place];
  const x = `${100 * (slice - item.first + 0.5) / item.count}%`;
  for (const plot of all('.strip .plot', articles[place])) {
    const svg = plot.querySelector('svg');
    let line = svg.querySelector(`:scope > .cursor.${kind}`);
    if (!line) {
      line = document.createElementNS(SVG, 'line');
      line.setAttribute('class', `cursor ${kind}`);
      line.setAttribute('y1', '10');
      line.setAttribute('y2', String(svg.height.baseVal.value - 22));
      svg.append(line);
    }
    line.setAttribute('x1', x);
    line.setAttribute('x2', x);
  }
  all('.strip .readout', articles[place]).forEach((readout, index) => { readout.textContent = `Slice ${slice}: ${describe(item.structures[index], slice)}`; });
}

function chooseSlice(place, slice, start) {
  const item = data.cases[place];
  item.chosen = slice;
  if (slice >= item.first && slice < item.first + item.count) pointAt(place, slice, 'chosen');
  for (const plot of all('.strip [role=slider]', articles[place])) {
    plot.setAttribute('aria-valuenow', String(slice));
    const structure = item.structures.find((each) => each.key === plot.parentElement.dataset.structure);
    plot.setAttribute('aria-valuetext', `slice ${slice}, ${structure.name}: ${describe(structure, slice)}`);
  }
  if (item.volumes && (start || viewer.running)) viewer.show(place, slice);
}

function setUpStrips(place) {
  const item = data.cases[place];
  item.ready = true;
  for (const plot of all('.strip .plot', articles[place])) {
    const at = (event) => {
      const box = plot.querySelector('svg').getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      return item.first + Math.min(Math.max(Math.floor(share * item.count), 0), item.count - 1);
    };
    plot.tabIndex = 0;
    plot.setAttribute('role', 'slider');
    plot.setAttribute('aria-label', `Slice of ${item.id}`);
    plot.setAttribute('aria-valuemin', String(item.first));
    plot.setAttribute('aria-valuemax', String(item.first + item.count - 1));
    plot.setAttribute('aria-valuenow', String(item.first));
    plot.addEventListener('pointermove', (event) => (event.buttons & 1 ? chooseSlice(place, at(event), false) : pointAt(place, at(event), 'passing')));
    plot.addEventListener('pointerleave', () => {
      all('.cursor.passing', articles[place]).forEach((line) => line.remove());
      if (item.chosen !== undefined) pointAt(place, item.chosen, 'chosen');
    });
    plot.addEventListener('click', (event) => chooseSlice(place, at(event), true));
    plot.addEventListener('keydown', (event) => {
      const now = item.chosen ?? item.first;
      const last = item.first + item.count - 1;
      const next = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: item.first, End: last, Enter: now }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      chooseSlice(place, Math.min(Math.max(next, item.first), last), event.key === 'Enter');
    });
  }
}

function setUpPictures() {
  document.addEventListener('click', (event) => {
    const link = event.target.closest('a[data-slice]');
    if (!link) return;
    event.preventDefault();
    const anchor = link.getAttribute('href').slice(1);
    const place = data.cases.findIndex((item) => item.anchor === anchor);
    if (place < 0) return;
    if (place !== current) { history.pushState(null, '', `#${anchor}`); openCase(place); }
    chooseSlice(place, Number(link.dataset.slice), true);
    const seen = articles[place].querySelector('.viewer') || articles[place].querySelector('.strips');
    if (seen) seen.scrollIntoView({ block: 'nearest' });
  });
}
