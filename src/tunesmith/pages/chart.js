// Values under the pointer. The charts are whole without this script.
for (const figure of document.querySelectorAll("figure.chart")) {
  const lines = JSON.parse(figure.dataset.lines), svg = figure.querySelector("svg");
  const here = svg.querySelector(".here"), output = figure.querySelector("output");
  const nearest = (places, x) => {
    let low = 0, high = places.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (places[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - places[low - 1] < places[low] - x ? low - 1 : low;
  };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const found = lines.map((line) => ({ line, at: nearest(line.at, x) }));
    found.sort((a, b) => Math.abs(a.line.at[a.at] - x) - Math.abs(b.line.at[b.at] - x));
    const place = found[0].line.at[found[0].at];
    here.setAttribute("x1", place); here.setAttribute("x2", place);
    here.style.visibility = "visible";
    const texts = lines.map((line) => {
      const at = nearest(line.at, place);
      return Math.abs(line.at[at] - place) < 2 ? line.name + " " + line.y[at] : "";
    });
    output.textContent = "step " + found[0].line.x[found[0].at] + ": " + texts.filter(Boolean).join(", ");
  };
  const hide = () => { here.style.visibility = "hidden"; output.textContent = ""; };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
