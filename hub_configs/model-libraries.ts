// What the Hub would need to know of this library, for packages/tasks/src in huggingface.js: until it is there, the Hub
// shows timm's code beside a model, by the tag `timm`, without the import that it needs. OWNER is where the code will be
// published.

// model-libraries.ts
	"timm-memwrap": {
		prettyLabel: "timm-memwrap",
		repoName: "timm-memwrap",
		repoUrl: "https://github.com/OWNER/timm-memwrap",
		snippets: snippets.timm_memwrap,
		filter: false,
		countDownloads: `path:"config.json"`,
	},

// model-libraries-snippets.ts
export const timm_memwrap = (model: ModelData): string[] => [
	`import timm
import timm_memwrap
model = timm.create_model("hf-hub:${model.id}", pretrained=True).eval()`,
];
