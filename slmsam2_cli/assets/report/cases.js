/* Show one case at a time, named in the page's address; next and previous follow the order of the table. */
const articles = all('.case');
let current = -1;

const go = (anchor) => { if (location.hash === `#${anchor}`) openHash(); else location.hash = anchor; };

function openHash() {
  const wanted = location.hash.slice(1);
  const place = data.cases.findIndex((item) => item.anchor === wanted);
  if (place >= 0) openCase(place);
}

function openCase(place) {
  const changed = place !== current;
  if (!data.cases[place].ready) setUpStrips(place);
  current = place;
  articles.forEach((article, index) => article.classList.toggle('open', index === place));
  for (const row of rows) row.element.classList.toggle('open', row.place === place);
  document.querySelector('.hint').hidden = true;
  articles[place].scrollIntoView();
  articles[place].focus({ preventScroll: true });
  if (changed && viewer.running) viewer.show(place);
}

function step(by) {
  const order = [...new Set(rows.filter((row) => !row.element.hidden).map((row) => row.place))];
  if (!order.length) return;
  const at = order.indexOf(current);
  const next = at < 0 ? (by > 0 ? 0 : order.length - 1) : Math.min(Math.max(at + by, 0), order.length - 1);
  go(data.cases[order[next]].anchor);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.target.closest('input, select, textarea, canvas, [role=slider], .scroll') && event.key.startsWith('Arrow')) return;
  if (event.target.closest('input, select, textarea, canvas')) return;
  const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
  if (by) { event.preventDefault(); step(by); }
}
