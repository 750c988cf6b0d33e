/* The case table: sort (missing values last), filter rows, and switch between all slices and unprompted slices. */
const table = byId('table');
const body = table.tBodies[0];
const fixed = table.tHead.rows[0].cells.length - data.columns.length;
const rows = [...body.rows].map((element, order) => {
  const [place, part] = element.dataset.at.split('.').map(Number);
  return { element, order, place, structure: data.cases[place].structures[part] || null, text: element.textContent.toLowerCase() };
});
const sorting = { column: -1, down: false };
const part = () => (byId('part') ? byId('part').value : 'all');

function sortKey(row, column) {
  if (column >= fixed) {
    const values = row.structure ? row.structure[part()] : [];
    const value = values[column - fixed];
    return value === undefined ? null : value;
  }
  return row.element.cells[column].textContent.trim().toLowerCase() || null;
}

function compare(a, b) {
  if (sorting.column < 0) return a.order - b.order;
  const [x, y] = [sortKey(a, sorting.column), sortKey(b, sorting.column)];
  if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;
  const raw = typeof x === 'number' ? x - y : x.localeCompare(y, undefined, { numeric: true });
  return (sorting.down ? -raw : raw) || a.order - b.order;
}

function sortRows() {
  rows.sort(compare);
  body.append(...rows.map((row) => row.element));
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    if (index === sorting.column) cell.setAttribute('aria-sort', sorting.down ? 'descending' : 'ascending');
    else cell.removeAttribute('aria-sort');
  });
}

function sortBy(column) {
  const worstDown = column >= fixed && data.columns[column - fixed].better === 'low';
  sorting.down = sorting.column === column ? !sorting.down : worstDown;
  sorting.column = column;
  sortRows();
}

function filterRows() {
  const words = byId('find').value.toLowerCase().split(/\s+/).filter(Boolean);
  const structure = byId('by-structure') ? byId('by-structure').value : '';
  const group = byId('by-group') ? byId('by-group').value : '';
  let shown = 0;
  for (const row of rows) {
    const fits = words.every((word) => row.text.includes(word)) && (!structure || !row.structure || row.structure.key === structure) &&
      (!group || data.cases[row.place].group === group);
    row.element.hidden = !fits;
    shown += fits;
  }
  byId('shown').textContent = `${shown} of ${rows.length} rows`;
}

function showPart() {
  for (const row of rows) {
    if (!row.structure) continue;
    data.columns.forEach((column, index) => {
      const cell = row.element.cells[fixed + index];
      const value = row.structure[part()][index];
      cell.dataset.why ??= cell.title;
      cell.title = value !== null ? '' : part() === 'all' ? cell.dataset.why : 'unknown';
      cell.textContent = value === null ? missing : value.toFixed(column.digits).replace('-', '−');
      if (cell.classList.contains('dice')) cell.className = value === null ? 'v dice' : `v dice d${diceClass(value)}`;
    });
  }
  if (sorting.column >= 0) sortRows();
}

const diceClass = (value) => data.bins.filter((edge) => value >= edge).length;

function setUpTable() {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...cell.childNodes);
    button.addEventListener('click', () => sortBy(column));
    cell.append(button);
  });
  body.addEventListener('click', (event) => {
    const row = event.target.closest('tr');
    if (row && !event.target.closest('a') && !String(getSelection())) go(data.cases[Number(row.dataset.at.split('.')[0])].anchor);
  });
  byId('worst-first').addEventListener('click', () => { sorting.column = -1; sortRows(); });
  for (const id of ['find', 'by-structure', 'by-group']) if (byId(id)) byId(id).addEventListener('input', filterRows);
  if (byId('part')) byId('part').addEventListener('input', showPart);
  byId('find').form.addEventListener('submit', (event) => event.preventDefault());
  filterRows();
}
