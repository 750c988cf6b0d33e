/* Set up the page, once everything is defined. */
setUpTable();
setUpPictures();
byId('previous').addEventListener('click', () => step(-1));
byId('next').addEventListener('click', () => step(1));
document.addEventListener('keydown', onKey);
addEventListener('hashchange', openHash);
addEventListener('beforeprint', () => all('details').forEach((element) => { element.open = true; }));
openHash();
