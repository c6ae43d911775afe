// SPDX-License-Identifier: MIT-0

// The arrows of the navigation have no text: a screen reader says what they open.
for (const arrow of document.querySelectorAll(".bd-sidebar-primary summary")) {
  const chapter = arrow.closest("li").querySelector("a").textContent.trim();
  arrow.setAttribute("aria-label", `Pages of ${chapter}`);
}

// "Copy with all it needs": the button takes its file's text to the clipboard.

async function copied(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = document.createElement("textarea"); // a server without https has no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

async function copy(button) {
  const label = button.textContent;
  try {
    const answer = await fetch(button.dataset.lifted);
    if (!answer.ok) throw new Error(answer.statusText);
    await copied(await answer.text());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 2000);
  } catch {
    window.location = button.dataset.lifted; // opened as a file, a page may not read another
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-lifted]");
  if (button) copy(button);
});
