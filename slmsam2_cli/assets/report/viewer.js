/* The viewer: NiiVue is unpacked and started when the first case is opened; all cases share one canvas. */
const REFERENCE = [[86, 180, 233], [0, 114, 178], [160, 216, 245], [30, 144, 200]];
const PREDICTION = [[230, 159, 0], [213, 94, 0], [245, 200, 90], [190, 120, 20]];

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const letters = atob(base64);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

function unpack(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

function addScript(fill) {
  return new Promise((resolve, reject) => {
    const element = document.createElement('script');
    element.onload = resolve;
    element.onerror = () => reject(new Error(`The file ${element.getAttribute('src')} is missing. Keep it in its folder next to this page.`));
    fill(element);
    document.head.append(element);
    if (!element.src) resolve();
  });
}

async function niivueLibrary() {
  if (!window.niivue) {
    const text = new TextDecoder().decode(await unpack(byId('viewer-library').textContent));
    await addScript((element) => { element.textContent = text; });
  }
  return window.niivue;
}

async function volumesOf(item) {
  if (item.volumes === 'page') {
    const holder = all('script[data-volumes]').find((element) => element.dataset.volumes === item.id);
    return JSON.parse(holder.textContent);
  }
  const known = () => window.slmsam2Volumes && window.slmsam2Volumes.get(item.id);
  if (!known()) await addScript((element) => { element.src = item.file.split('/').map(encodeURIComponent).join('/'); });
  if (!known()) throw new Error(`The file ${item.file} does not hold this case.`);
  return known();
}

// Returns size, data offset and voxels of an unpacked label NIfTI; null when the voxels are not 8 or 16 bits.
function labelsIn(buffer) {
  const view = new DataView(buffer);
  const size = [42, 44, 46].map((at) => view.getInt16(at, true));
  const start = view.getFloat32(108, true);
  const Kind = { 8: Uint8Array, 16: Uint16Array }[view.getInt16(72, true)];
  return Kind ? { size, start, stride: [1, size[0], size[0] * size[1]], voxels: new Kind(buffer.slice(start)) } : null;
}

// Returns the middle of the bounding box of all labels, 0 to 1 along each stored axis.
function middleOf(buffer) {
  const mask = labelsIn(buffer);
  if (!mask) return [0.5, 0.5, 0.5];
  const [least, most] = [[...mask.size], [-1, -1, -1]];
  mask.voxels.forEach((label, index) => {
    if (!label) return;
    for (let i = 0; i < 3; i++) {
      const at = Math.floor(index / mask.stride[i]) % mask.size[i];
      least[i] = Math.min(least[i], at);
      most[i] = Math.max(most[i], at);
    }
  });
  return mask.size.map((length, i) => (most[i] < 0 ? 0.5 : (Math.floor((least[i] + most[i]) / 2) + 0.5) / length));
}

// Returns a mask reduced to the outlines of its labels within each slice along `axis`.
function outlined(buffer, axis) {
  const mask = labelsIn(buffer);
  if (!mask) return buffer;
  const { size, start, stride, voxels: read } = mask;
  const write = read.slice();
  const [a, b] = [0, 1, 2].filter((i) => i !== axis);
  const inside = (index, i, at) => at > 0 && at < size[i] - 1 && read[index - stride[i]] === read[index] && read[index + stride[i]] === read[index];
  for (let z = 0, index = 0; z < size[2]; z++) for (let y = 0; y < size[1]; y++) for (let x = 0; x < size[0]; x++, index++) {
    if (!read[index]) continue;
    const at = [x, y, z];
    if (inside(index, a, at[a]) && inside(index, b, at[b])) write[index] = 0;
  }
  const copy = buffer.slice(0);
  new Uint8Array(copy).set(new Uint8Array(write.buffer), start);
  return copy;
}

const labelsOf = (key) => (key.match(/\d+/g) || []).map(Number);

function labelColours(palette, chosen) {
  const known = [...new Set(data.structures.flatMap(([key]) => labelsOf(key)))].sort((x, y) => x - y);
  const wanted = chosen ? labelsOf(chosen) : known;
  const colours = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [''] };
  known.forEach((value, index) => {
    if (!value) return;
    const [r, g, b] = palette[index % palette.length];
    const name = (data.structures.find(([key]) => labelsOf(key).join() === String(value)) || ['', String(value)])[1];
    colours.R.push(r); colours.G.push(g); colours.B.push(b); colours.A.push(wanted.includes(value) ? 255 : 0); colours.I.push(value); colours.labels.push(name);
  });
  return colours;
}

const viewer = {
  running: false, place: -1, panel: null, canvas: null, nv: null, stack: null, buffers: {}, masks: {}, turn: 0,

  message(text) { this.panel.querySelector('.message').textContent = text; },

  build() {
    this.panel = byId('viewer-template').content.firstElementChild.cloneNode(true);
    this.canvas = this.panel.querySelector('canvas');
    for (const [mask, opacity, outline] of [['reference', 1, true], ['prediction', 0.5, false]]) {
      const field = this.panel.querySelector(`[data-mask=${mask}]`);
      field.querySelector('[type=range]').value = opacity;
      field.querySelector('[data-does=outline]').checked = outline;
      field.querySelector('[type=range]').addEventListener('input', () => this.shade());
      field.querySelector('[type=checkbox]').addEventListener('input', () => this.shade());
      field.querySelector('[data-does=outline]').addEventListener('input', () => this.load());
    }
    this.does('structure').addEventListener('input', () => this.colour());
    this.does('view').addEventListener('input', () => this.nv.setSliceType(Number(this.does('view').value)));
    this.does('slice').addEventListener('input', () => chooseSlice(this.place, Number(this.does('slice').value), true));
  },

  does(what) { return this.panel.querySelector(`.controls > label [data-does=${what}]`); },
  field(mask) { return this.panel.querySelector(`[data-mask=${mask}]`); },

  async start() {
    if (this.nv) return;
    if (!document.createElement('canvas').getContext('webgl2')) throw new Error('The viewer needs WebGL 2, which this browser does not support. Everything else on this page works without it.');
    if (!window.DecompressionStream) throw new Error('This browser is too old for the viewer (no DecompressionStream). Everything else on this page works without it.');
    const { Niivue } = await niivueLibrary();
    const nv = new Niivue({ logLevel: 'error', dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true, crosshairWidth: 0.25, crosshairGap: 4, crosshairColor: [1, 1, 1, 0.7], multiplanarShowRender: 0, loadingText: '', isOrientationTextVisible: true, scrollRequiresFocus: true });
    await nv.attachToCanvas(this.canvas);
    nv.onLocationChange = () => this.moved();
    this.nv = nv;
  },

  // Opens a case; a later call cancels one that is still loading.
  async show(place, slice) {
    const slot = articles[place].querySelector('.slot');
    if (!slot) return;
    if (!this.panel) this.build();
    if (place === this.place && this.canvas.dataset.state === 'ready') {
      if (slice !== undefined) this.move(slice);
      return;
    }
    const turn = ++this.turn;
    this.running = true;
    this.place = place;
    slot.replaceChildren(this.panel);
    this.canvas.dataset.state = 'loading';
    this.message('Loading…');
    try {
      await this.start();
      const stack = await volumesOf(data.cases[place]);
      const buffers = {};
      for (const name of ['image', 'prediction', 'reference']) if (stack[name]) buffers[name] = await unpack(stack[name]);
      if (turn !== this.turn) return;
      Object.assign(this, { stack, buffers });
      await this.load();
      this.prepare(slice ?? data.cases[place].chosen);
    } catch (error) {
      if (turn !== this.turn) return;
      this.message(error.message);
      this.canvas.dataset.state = 'failed';
    }
  },

  async load() {
    const { nv, stack, buffers } = this;
    const turn = this.turn;
    const NVImage = window.niivue.NVImage;
    const images = {};
    for (const name of Object.keys(buffers)) {
      const line = name !== 'image' && this.field(name).querySelector('[data-does=outline]').checked;
      const buffer = line ? outlined(buffers[name], stack.axis) : buffers[name];
      images[name] = await NVImage.loadFromUrl({ url: `${name}.nii`, name: `${name}.nii`, buffer, colorbarVisible: false });
    }
    if (turn !== this.turn) return;
    this.masks = images;
    nv.volumes = Object.values(images);
    for (const mask of ['reference', 'prediction']) this.field(mask).hidden = !images[mask];
    this.colour();
  },

  colour() {
    const chosen = this.does('structure').value;
    if (this.masks.reference) this.masks.reference.setColormapLabel(labelColours(REFERENCE, chosen));
    if (this.masks.prediction) this.masks.prediction.setColormapLabel(labelColours(PREDICTION, chosen));
    this.shade();
  },

  shade() {
    for (const mask of ['reference', 'prediction']) {
      const field = this.field(mask);
      const opacity = field.querySelector('[type=checkbox]').checked ? Number(field.querySelector('[type=range]').value) : 0;
      if (this.masks[mask]) this.masks[mask].opacity = opacity;
    }
    this.nv.setVolume(this.nv.volumes[0], 0);
  },

  // NiiVue reorients every volume to RAS. Returns which of its axes is the stored one, whether that is reversed, and its length.
  axis(stored = this.stack.axis) {
    const volume = this.nv.volumes[0];
    const at = volume.permRAS.findIndex((axis) => Math.abs(axis) === stored + 1);
    return { at, reversed: volume.permRAS[at] < 0, length: volume.dimsRAS[at + 1] };
  },

  prepare(slice) {
    const { first, step, note } = this.stack;
    const { length } = this.axis();
    const range = this.does('slice');
    [range.min, range.max, range.step] = [first, first + (length - 1) * step, step];
    this.panel.querySelector('[data-shows=note]').textContent = note;
    this.message('');
    this.canvas.dataset.case = data.cases[this.place].id;
    this.canvas.dataset.state = 'ready';
    const position = [0.5, 0.5, 0.5];
    middleOf(this.buffers.prediction).forEach((share, stored) => { const { at, reversed } = this.axis(stored); position[at] = reversed ? 1 - share : share; });
    this.nv.scene.crosshairPos = position;
    this.nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    this.move(slice ?? first + Math.floor(length / 2) * step);
  },

  move(slice) {
    const { at, reversed, length } = this.axis();
    const index = Math.min(Math.max(Math.round((slice - this.stack.first) / this.stack.step), 0), length - 1);
    const position = [...this.nv.scene.crosshairPos];
    position[at] = ((reversed ? length - 1 - index : index) + 0.5) / length;
    this.nv.scene.crosshairPos = position;
    this.nv.drawScene();
    this.showSlice();
  },

  slice() {
    const { at, reversed, length } = this.axis();
    const found = Math.min(Math.max(Math.floor(this.nv.scene.crosshairPos[at] * length), 0), length - 1);
    return this.stack.first + (reversed ? length - 1 - found : found) * this.stack.step;
  },

  showSlice() {
    const slice = this.slice();
    this.canvas.dataset.slice = String(slice);
    this.does('slice').value = slice;
    this.panel.querySelector('[data-shows=slice]').textContent = String(slice);
    return slice;
  },

  moved() {
    if (this.canvas.dataset.state !== 'ready') return;
    const item = data.cases[this.place];
    const before = item.chosen;
    const slice = this.showSlice();
    if (slice === before) return;
    item.chosen = slice;
    if (slice >= item.first && slice < item.first + item.count) pointAt(this.place, slice, 'chosen');
  },
};

document.addEventListener('click', (event) => {
  const button = event.target.closest('.slot .start');
  if (button) viewer.show(Number(button.closest('.case').dataset.case));
});
