// The theme, the menu of a narrow screen, and the search, which loads its index when somebody begins to search.
const root = document.body.dataset.root;
const byId = (id) => document.getElementById(id);
const html = document.documentElement;

const savedTheme = localStorage.getItem("theme");
if (savedTheme) html.dataset.theme = savedTheme;
byId("theme").onclick = () => {
  const dark = html.dataset.theme ? html.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  html.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", html.dataset.theme);
};

const scrollMenu = () => {
  const here = document.querySelector("#pages .here");
  if (here) byId("pages").scrollTop = here.offsetTop - 200;
};
byId("menu").onclick = () => {
  const open = byId("pages").classList.toggle("open");
  byId("menu").setAttribute("aria-expanded", open);
  scrollMenu();
};
scrollMenu();

// A link to a folded part unfolds it.
const unfold = () => {
  const target = location.hash && byId(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", unfold);
unfold();

let index;
const load = () => index ||= new Promise((done) => {
  const script = document.createElement("script");
  script.src = root + "assets/search.js";
  script.onload = () => done(window.SEARCH);
  document.head.append(script);
});

// An entry must contain every word. A word in the heading counts most, then one in the page's title, then one in the text.
const score = ([page, heading, , text], words) => {
  let sum = 0;
  for (const word of words) {
    const inText = text.split(word).length - 1;
    const inTitles = heading.toLowerCase().includes(word) * 20 + page.toLowerCase().includes(word) * 8;
    if (!inText && !inTitles) return 0;
    sum += inTitles + Math.min(inText, 5) + (heading.toLowerCase() === word) * 40;
  }
  return sum;
};

const search = async () => {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const entries = await load();
  const best = words.length
    ? entries.map((entry) => [score(entry, words), entry]).filter(([s]) => s).sort((a, b) => b[0] - a[0]).slice(0, 12)
    : [];
  byId("results").replaceChildren(...best.map(([, [page, heading, address, text]]) => {
    const at = Math.max(0, text.indexOf(words[0]) - 40);
    const item = document.createElement("li"), link = document.createElement("a"), snippet = document.createElement("small");
    link.href = root + address;
    link.textContent = heading && heading !== page ? `${page}: ${heading}` : page;
    snippet.textContent = (at ? "… " : "") + text.slice(at, at + 110);
    link.append(snippet);
    item.append(link);
    return item;
  }));
  if (words.length && !best.length) byId("results").textContent = "nothing found";
  byId("results").hidden = !words.length;
};
byId("search").oninput = search;
byId("search").onfocus = load;
byId("search").onkeydown = (event) => {
  const links = [...byId("results").querySelectorAll("a")];
  if (event.key === "Escape") byId("results").hidden = true;
  if (event.key === "Enter" && links[0]) location.href = links[0].href;
  if (event.key === "ArrowDown" && links[0]) { links[0].focus(); event.preventDefault(); }
};
addEventListener("click", (event) => { if (!event.target.closest(".search")) byId("results").hidden = true; });
addEventListener("keydown", (event) => {
  if (event.key === "/" && event.target.tagName !== "INPUT") { byId("search").focus(); event.preventDefault(); }
});
