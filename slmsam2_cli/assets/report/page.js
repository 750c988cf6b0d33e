/* The scripts of a report. The files run as one function, in the order page.js, table.js, cases.js, slices.js, viewer.js, start.js.
   Nothing is fetched. Data becomes text nodes and attributes, never markup. */
const byId = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const data = JSON.parse(byId('data').textContent);
const evaluation = data.kind === 'evaluation';
const missing = '–';
