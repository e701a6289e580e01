// How the search ranks pages. Sphinx counts a page that has the word once as much as one that explains it.
var Scorer = {
  score: ([page, , , , score]) =>
    score + (page === "docs/walkthrough" ? 2 : 0) - (/CHANGELOG|-log$|-tables$|source$/.test(page) ? 9 : 0),
  // What follows are Sphinx's own numbers.
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
