// The page is complete without this script; it only lets the reader choose another head or word.
const words = [...document.querySelectorAll(".sentence button")];
const thumbs = [...document.querySelectorAll(".grid a")];
const cells = [...document.querySelectorAll(".map g rect[x]:not(.frame)")];
const rowLabels = [...document.querySelectorAll(".map text[text-anchor]")];
const frame = document.querySelector(".map .frame");
const bars = [...document.querySelectorAll("#bars li")];
const n = data.labels.length;
let chosen = data.chosen;
let word = data.word;

const step = (perMille) => Math.min(9, Math.floor(Math.sqrt(perMille / 1000) * 9 + 0.5));
const percent = (perMille) => (perMille > 0 && perMille < 5 ? "<1 %" : `${Math.round(perMille / 10)} %`);

function show() {
  const weights = data.maps[chosen];
  cells.forEach((cell, c) => {
    const i = Math.floor(c / n), j = c % n;
    cell.setAttribute("class", `l${step(weights[c])}`);
    cell.firstChild.textContent = `${data.labels[i]} → ${data.labels[j]}: ${percent(weights[c])}`;
  });
  rowLabels.forEach((label, i) => label.classList.toggle("emphasis", i === word));
  frame.setAttribute("y", word);
  document.querySelector(".map").setAttribute("aria-label", data.names[chosen]);
  document.getElementById("caption").textContent = data.names[chosen];
  document.getElementById("word").textContent = data.labels[word];
  const row = weights.slice(word * n, word * n + n);
  const order = [...row.keys()].sort((a, b) => row[b] - row[a]);
  bars.forEach((bar, rank) => {
    const j = order[rank];
    const name = bar.querySelector(".name");
    name.textContent = data.labels[j];
    name.classList.toggle("mark", data.special[j]);
    bar.querySelector(".bar").style.width = `${100 * row[j] / Math.max(row[order[0]], 1)}%`;
    bar.querySelector(".share").textContent = percent(row[j]);
  });
  words.forEach((button, j) => {
    const shade = step(row[j]);
    button.setAttribute("aria-pressed", j === word);
    button.title = percent(row[j]);
    button.style.background = shade ? `var(--l${shade})` : "";
    button.style.color = shade ? `var(--on${shade})` : "";
  });
  thumbs.forEach((thumb, m) => thumb.setAttribute("aria-current", m === chosen));
}

words.forEach((button, j) => button.addEventListener("click", () => { word = j; show(); }));
thumbs.forEach((thumb, m) => thumb.addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  chosen = m;
  show();
  document.getElementById("caption").scrollIntoView({ block: "nearest" });
}));
cells.forEach((cell, c) => cell.addEventListener("click", () => { word = Math.floor(c / n); show(); }));
show();
