/* Everything is defined: set up the page. */
setUpTable();
setUpPictures();
byId('previous').addEventListener('click', () => step(-1));
byId('next').addEventListener('click', () => step(1));
document.addEventListener('keydown', onKey);
addEventListener('hashchange', openHash);
addEventListener('beforeprint', () => all('details').forEach((element) => { element.open = true; }));
openHash();
