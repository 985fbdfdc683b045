// Filtering, ordering and help of the comparison page. Markup and data: compare.html.j2 and omninft.gallery.compare.
(() => {
  "use strict";

  const { groups, visit } = window.omninft; // groups[i] shows data.prompts[i], wherever it stands in the list
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (name) => document.querySelector(`[data-${name}]`);
  const control = Object.fromEntries(
    ["search", "category", "present", "first", "second", "measure", "of", "direction", "from", "to"].map((name) => [name, find(name)]),
  );
  const valueOf = (name) => control[name]?.value ?? "";
  const list = document.querySelector("[data-player-list]");
  const help = find("help");
  const texts = data.prompts.map((prompt) => prompt.text.toLowerCase());

  // The two systems whose difference counts, and which the blind test sets against each other.
  function pair() {
    return control.first ? [Number(valueOf("first")), Number(valueOf("second"))] : [0, data.systems.length - 1];
  }

  // What the prompt `index` is ordered and filtered by; null where it is missing.
  function quantity(index) {
    const prompt = data.prompts[index];
    const measure = valueOf("measure");
    if (measure === "disagreement") return prompt.disagreement;
    const scores = prompt.scores[Number(measure)];
    const of = valueOf("of");
    if (of !== "difference" && of !== "size") return scores[Number(of)];
    const [first, second] = pair().map((system) => scores[system]);
    if (first === null || second === null) return null;
    return of === "size" ? Math.abs(second - first) : second - first;
  }

  // Whether the prompt `index` is among those looked for by words and category.
  function isMeant(index) {
    const words = valueOf("search").toLowerCase().split(/\s+/).filter(Boolean);
    const category = valueOf("category");
    return words.every((word) => texts[index].includes(word))
      && (!category || data.prompts[index].categories.includes(category));
  }

  function isWithin(index) {
    const complete = data.prompts[index].shown.every(Boolean);
    if (valueOf("present") && (valueOf("present") === "complete") !== complete) return false;
    const [from, to] = [control.from, control.to].map((input) => (input ? input.valueAsNumber : NaN));
    if (!isNumeric(valueOf("measure")) || (Number.isNaN(from) && Number.isNaN(to))) return true;
    const value = quantity(index);
    return value !== null && !(value < from) && !(value > to);
  }

  function isNumeric(measure) { return measure !== "" && measure !== "category"; }

  function apply() {
    const measure = valueOf("measure");
    find("of-row")?.toggleAttribute("hidden", !isNumeric(measure) || measure === "disagreement");
    find("range-row")?.toggleAttribute("hidden", !isNumeric(measure));
    find("explain")?.toggleAttribute("hidden", measure !== "disagreement");
    const order = groups.map((_, index) => index);
    if (measure === "category") {
      const names = data.prompts.map((prompt) => prompt.categories.join(", "));
      order.sort((a, b) => names[a].localeCompare(names[b]) || a - b);
    } else if (measure !== "") {
      const sign = Number(valueOf("direction"));
      const key = order.map((index) => quantity(index));
      const place = (index) => (key[index] === null ? Infinity : sign * key[index]); // without a value: last
      order.sort((a, b) => (place(a) === place(b) ? a - b : place(a) < place(b) ? -1 : 1));
    }
    arrange(order);
    let count = 0;
    groups.forEach((group, index) => {
      const shown = isMeant(index) && isWithin(index);
      if (!shown) group.pause();
      group.root.hidden = !shown;
      count += shown;
    });
    find("nothing").hidden = count > 0;
    const all = `${groups.length} ${groups.length === 1 ? "prompt" : "prompts"}`;
    find("count").textContent = count === groups.length ? all : `${count} of ${all}`;
  }

  function arrange(order) {
    const wanted = order.map((index) => groups[index].root);
    if (wanted.every((root, place) => list.children[place] === root)) return;
    groups.forEach((group) => group.pause()); // a video that is moved stops
    list.append(...wanted);
  }

  find("filters").addEventListener("input", apply);
  find("filters").addEventListener("reset", () => setTimeout(apply));
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  document.querySelectorAll("[data-help-open]").forEach((button) => button.addEventListener("click", () => help.showModal()));
  find("help-close").addEventListener("click", () => help.close());

  // Before the players' own keys.
  document.addEventListener("keydown", (event) => {
    if (help.open) {
      event.stopImmediatePropagation();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "?") help.showModal();
    else if (event.key === "/" && !document.body.classList.contains("blind")) find("search").focus();
    else if (event.key.toLowerCase() === "b") window.omninft.toggleBlind();
    else return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }, true);

  Object.assign(window.omninft, { data, pair, isMeant, apply, visit });
  // Browsers fill in what was chosen before a reload.
  apply();
})();
